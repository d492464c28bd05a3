#!/usr/bin/env python3
"""Makes a picture of a recorded terminal: `make demo | tests/demo-svg.py 'What make demo writes' >docs/demo.svg`.

A line begins with what has written it, as in `guest | hello`, or with the prompt of a command, as in `host$ ls`. The times and
modules of the logs are left out, so that their lines are short.
"""

import re
import sys
import textwrap
from xml.sax.saxutils import escape

COLUMNS = 100
CHARACTER, LINE, MARGIN = 8.4, 19, 16
COMMAND, TEXT = "#ffffff", "#c9d1d9"
DAEMON, NEW_DAEMON, GUEST, OTHER_GUEST, HOST = "#9da7b3", "#d2a8ff", "#7ee787", "#f2cc60", "#79c0ff"
# The first that fits says what colour a line has.
COLOURS = [
    (r"(host|guest\d?)\$ ", COMMAND),
    (r"daemon \| ", DAEMON),
    (r"new daemon \| ", NEW_DAEMON),
    (r"guest5 \| ", OTHER_GUEST),
    (r"guest\d? \| ", GUEST),
    (r"host \| ", HOST),
    (r"", TEXT),
]
GUEST_COMMAND = re.compile(r"^guest\d? \| (?=guest\d?\$ )")
LOG_PREFIX = re.compile(r"(?<=daemon \| )\[\S+ +\w+ +[\w:]+\] ")
KERNEL_TIME = re.compile(r"(?<= \| )\[ *\d+\.\d+\] ")


def recorded_lines(text):
    """From the first command on: what stands before is about the building."""
    lines = text.splitlines()
    for left_out in GUEST_COMMAND, LOG_PREFIX, KERNEL_TIME:
        lines = [left_out.sub("", line) for line in lines]
    begin = next(i for i, line in enumerate(lines) if line.startswith("host$ "))
    return lines[begin:]


def command_lines(command):
    """A command that is too long, broken before its options, as a person would type it."""
    words = re.split(r" (?=-)", command)
    lines = [words[0]]
    for word in words[1:]:
        # Room for the backslash.
        if len(lines[-1]) + 1 + len(word) <= COLUMNS - 2:
            lines[-1] += " " + word
        else:
            lines[-1] += " \\"
            lines.append("    " + word)
    return lines


def drawn_lines(lines):
    """Pairs of colour and text, no longer than the picture is wide."""
    for line in lines:
        colour = next(colour for begin, colour in COLOURS if re.match(begin, line))
        is_command = colour == COMMAND and len(line) > COLUMNS
        for part in command_lines(line) if is_command else [line]:
            # With the indentation of the part that is too long still.
            indent = " " * (len(part) - len(part.lstrip()) + 4)
            for drawn in textwrap.wrap(part, COLUMNS, subsequent_indent=indent, break_on_hyphens=False):
                yield colour, drawn


def svg(title, lines):
    width = round(COLUMNS * CHARACTER + 2 * MARGIN)
    height = len(lines) * LINE + 2 * MARGIN
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    yield '     font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="14">'
    yield f"<title>{escape(title)}</title>"
    # The edge keeps it apart from a page that is as dark.
    yield f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#0d1117" stroke="#6e7681"/>'
    for number, (colour, text) in enumerate(lines):
        y = MARGIN + (number + 0.75) * LINE
        # As wide as its letters, whatever font there is.
        length = round(len(text) * CHARACTER, 1)
        yield f'<text x="{MARGIN}" y="{y}" fill="{colour}" xml:space="preserve" textLength="{length}">{escape(text)}</text>'
    yield "</svg>"


def main():
    title = sys.argv[1] if len(sys.argv) > 1 else "What make demo writes"
    print("\n".join(svg(title, list(drawn_lines(recorded_lines(sys.stdin.read()))))))


main()

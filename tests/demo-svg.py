#!/usr/bin/env python3
"""Makes the README's picture of what `make demo` writes: `make demo | tests/demo-svg.py >docs/demo.svg`."""

import re
import sys
import textwrap
from xml.sax.saxutils import escape

COLUMNS = 104
CHARACTER, LINE, MARGIN = 8.4, 19, 16
COMMAND, DAEMON, GUEST, HOST, TEXT = "#ffffff", "#8b949e", "#7ee787", "#79c0ff", "#c9d1d9"
# The first that fits says what colour a line has.
COLOURS = [
    (r"(guest \| )?(host|guest)\$ ", COMMAND),
    (r"daemon \| ", DAEMON),
    (r"guest \| ", GUEST),
    (r"host \| ", HOST),
    (r"", TEXT),
]


def recorded_lines(text):
    """From the first command on: what stands before is about the building."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("host$ "))
    return lines[begin:]


def drawn_lines(lines):
    """Pairs of colour and text, no longer than the picture is wide."""
    for line in lines:
        colour = next(colour for begin, colour in COLOURS if re.match(begin, line))
        for part in textwrap.wrap(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False):
            yield colour, part


def svg(lines):
    width = round(COLUMNS * CHARACTER + 2 * MARGIN)
    height = len(lines) * LINE + 2 * MARGIN
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    yield '     font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="14">'
    yield "<title>What make demo writes</title>"
    yield f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>'
    for number, (colour, text) in enumerate(lines):
        y = MARGIN + (number + 0.75) * LINE
        # As wide as its letters, whatever font there is.
        length = round(len(text) * CHARACTER, 1)
        yield f'<text x="{MARGIN}" y="{y}" fill="{colour}" xml:space="preserve" textLength="{length}">{escape(text)}</text>'
    yield "</svg>"


print("\n".join(svg(list(drawn_lines(recorded_lines(sys.stdin.read()))))))

"""Runs the test's shell commands in the guest: `agent.py DEVICE`, where DEVICE is a serial line.

One line is one message; every text travels as hexadecimal, an empty one as `-`.
The test sends `run ID COMMAND`, `input ID DATA`, `close ID` (the command's standard input) and `kill ID`.
The agent says `ready` once and `done ID STATUS STDOUT STDERR` when a command has ended.
"""

import os
import signal
import subprocess
import sys
import threading
import tty


def to_hex(data):
    return data.hex() or "-"


def from_hex(text):
    return b"" if text == "-" else bytes.fromhex(text)


class Agent:
    def __init__(self, device):
        self.line = os.open(device, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.line)
        self.lock = threading.Lock()
        self.commands = {}

    def say(self, *words):
        data = (" ".join(words) + "\n").encode()
        with self.lock:
            while data:
                data = data[os.write(self.line, data):]

    def serve(self):
        self.say("ready")
        with os.fdopen(self.line, "rb", closefd=False) as messages:
            for message in messages:
                word, number, *rest = message.decode().split() or ["", ""]
                getattr(self, f"do_{word}", self.ignore)(number, *rest)

    def ignore(self, *_):
        """What is no message, such as a half line from before a reboot."""

    def do_run(self, number, text):
        pipe = subprocess.PIPE
        # A session of its own, so that `kill` reaches all of a pipeline.
        command = subprocess.Popen(from_hex(text), shell=True, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe)
        self.commands[number] = command
        threading.Thread(target=self.finish, args=(number, command), daemon=True).start()

    def do_input(self, number, data):
        command = self.commands.get(number)
        try:
            command.stdin.write(from_hex(data))
            command.stdin.flush()
        except (AttributeError, OSError, ValueError):
            pass  # The command has ended: its status says why.

    def do_close(self, number):
        command = self.commands.get(number)
        try:
            command.stdin.close()
        except (AttributeError, OSError):
            pass

    def do_kill(self, number):
        command = self.commands.get(number)
        if command:
            try:
                os.killpg(command.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def finish(self, number, command):
        output = {}

        def drain(name):
            output[name] = getattr(command, name).read()

        errors = threading.Thread(target=drain, args=("stderr",))
        errors.start()
        drain("stdout")
        errors.join()
        status = command.wait()
        self.commands.pop(number, None)
        self.say("done", number, str(status), to_hex(output["stdout"]), to_hex(output["stderr"]))


Agent(sys.argv[1]).serve()

"""The guest's end of a test, with nothing but Python's own AF_VSOCK sockets. `peer.py TASK ARGUMENT...`; see the functions named do_…

The bytes of a stream follow a pattern that both ends compute, so every byte is compared, and a difference has a place.
PORT is a port of the host, or CID:PORT. An ADDRESS is a port that is listened on for one connection, or the CID:PORT that is called.
"""

import errno
import hashlib
import random
import socket
import sys
import threading
import time

HOST = 2
BLOCK = (1 << 20) + 32  # Not a multiple of any write or buffer in use, so that no slip goes unseen.


class Pattern:
    """The endless stream of bytes that belongs to `seed`."""

    def __init__(self, seed, longest=1 << 18):
        blocks = (hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(BLOCK // 32))
        block = b"".join(blocks)
        self.twice = memoryview(block + block[:longest])

    def at(self, offset, size):
        start = offset % BLOCK
        return self.twice[start:start + size]


def connect(port):
    *cid, port = str(port).split(":")
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    stream.connect((int(cid[0]) if cid else HOST, int(port)))
    return stream


def connect_soon(port):
    """Connects as soon as a program listens there."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return connect(port)
        except (ConnectionResetError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def listen(port):
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, int(port)))
    listener.listen(128)
    return listener


def meet(address):
    """The one connection of this address."""
    if ":" in address:
        return connect_soon(address)
    with listen(address) as listener:
        return listener.accept()[0]


def send_pattern(stream, pattern, total, write):
    sent = 0
    while sent < total:
        sent += stream.send(pattern.at(sent, min(write, total - sent)))


def check_pattern(stream, pattern, total):
    received = 0
    while received < total:
        data = stream.recv(min(1 << 18, total - received))
        if not data:
            sys.exit(f"the stream ended after {received} of {total} bytes")
        if data != pattern.at(received, len(data)):
            sys.exit(f"wrong bytes within {len(data)} from {received} on")
        received += len(data)


def do_transfer(opener, port, total, write):
    """Sends and checks `total` bytes at once, in writes of `write` bytes."""
    stream = connect(port) if opener == "guest" else listen(port).accept()[0]
    move(stream, "guest", "host", int(total), int(write))
    stream.close()


def move(stream, mine, theirs, total, write):
    sender = threading.Thread(target=send_pattern, args=(stream, Pattern(mine), total, write))
    sender.start()
    check_pattern(stream, Pattern(theirs), total)
    sender.join()


def do_move(address, mine, theirs, total, write, flag=None):
    """Does what `transfer` does, with the patterns of two names. Prints its own port, and the other end's CID and port. Makes the
    file `flag` when the connection is there."""
    with meet(address) as stream:
        if flag:
            open(flag, "w").close()
        print(stream.getsockname()[1], *stream.getpeername())
        move(stream, mine, theirs, int(total), int(write))
        stream.shutdown(socket.SHUT_WR)
        if stream.recv(1):
            sys.exit("bytes behind the last one")


def do_pump(address, flag):
    """Sends without end, and compares what comes. Makes the file `flag` when a MiB has come; prints how the stream ended."""
    stream = meet(address)
    pattern, received = Pattern("pump"), 0
    sender = threading.Thread(target=send_until_it_breaks, args=(stream, pattern), daemon=True)
    sender.start()
    try:
        while data := stream.recv(65536):
            if data != pattern.at(received, len(data)):
                sys.exit(f"wrong bytes within {len(data)} from {received} on")
            if received < 1 << 20 <= received + len(data):
                open(flag, "w").close()
            received += len(data)
        print("end")
    except OSError as failure:
        print(errno.errorcode[failure.errno])
    sender.join()


def send_until_it_breaks(stream, pattern):
    try:
        send_pattern(stream, pattern, sys.maxsize, 65536)
    except OSError:
        pass


def do_ask(address):
    """Sends a question, then receives only, and prints the answer."""
    with meet(address) as stream:
        stream.sendall(b"question")
        stream.shutdown(socket.SHUT_WR)
        while data := stream.recv(100):
            print(data.decode(), end="")


def do_reply(address):
    """Receives the question to its end, and answers in two pieces: that direction is still open, not just flushed."""
    with meet(address) as stream:
        question = b""
        while data := stream.recv(100):
            question += data
        stream.sendall(b"%d bytes, " % len(question))
        time.sleep(0.3)
        stream.sendall(question)


def do_fill(port):
    """Writes until nobody takes more, closes at once and says how many bytes were taken."""
    fill(connect(port))


def do_fill_sibling(address):
    """The same over the connection of an address."""
    fill(meet(address))


def do_drain(address, pause):
    """Reads to the end after so many seconds, and says how many bytes that were."""
    pattern, received = Pattern("guest"), 0
    with meet(address) as stream:
        time.sleep(float(pause))
        while data := stream.recv(65536):
            if data != pattern.at(received, len(data)):
                sys.exit(f"wrong bytes within {len(data)} from {received} on")
            received += len(data)
    print(received)


def fill(stream):
    pattern = Pattern("guest")
    stream.setblocking(False)
    sent, idle = 0, 0
    while idle < 10:
        try:
            sent += stream.send(pattern.at(sent, 65536))
            idle = 0
        except BlockingIOError:
            # The device may still be moving bytes on.
            time.sleep(0.1)
            idle += 1
    stream.close()
    print(sent)


def exchange(stream, index, pattern):
    size = 1 + index * 131
    writer = threading.Thread(target=send_at, args=(stream, pattern, index * 977, size))
    writer.start()
    received = b""
    while len(received) < size:
        data = stream.recv(size - len(received))
        if not data:
            sys.exit(f"stream {index} ended after {len(received)} of {size} bytes")
        received += data
    writer.join()
    if received != pattern.at(index * 977, size):
        sys.exit(f"stream {index} answered wrong bytes")


def send_at(stream, pattern, offset, size):
    stream.sendall(pattern.at(offset, size))


def do_clients(port, count):
    """Holds `count` connections to an echo server at once; each gets back its own bytes."""
    pattern = Pattern("guest")
    streams = [connect_soon(port) for _ in range(int(count))]
    sys.stdin.readline()  # The test says when every other connection is open as well.
    failures = []
    run_all([(exchange_or_note, (stream, i, pattern, failures)) for i, stream in enumerate(streams)])
    if failures:
        sys.exit("\n".join(failures))


def exchange_or_note(stream, index, pattern, failures):
    try:
        exchange(stream, index, pattern)
    except (OSError, SystemExit) as failure:
        failures.append(f"{index}: {failure}")


def run_all(tasks):
    threads = [threading.Thread(target=task, args=arguments) for task, arguments in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def do_sequence(port, count):
    """Connects to an echo server, exchanges a few bytes and closes, `count` times."""
    for i in range(int(count)):
        exchange_number(port, i)


def do_repeat(port):
    """The same until its standard input ends; prints how many connections that were."""
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    count = 0
    while not over.is_set():
        exchange_number(port, count)
        count += 1
    print(count)


def exchange_number(port, number):
    with connect(port) as stream:
        message = b"number %d" % number
        stream.sendall(message)
        answer = b""
        while len(answer) < len(message):
            data = stream.recv(100)
            if not data:
                sys.exit(f"connection {number} ended early")
            answer += data
        if answer != message:
            sys.exit(f"connection {number} answered {answer}")


def do_echo(port):
    """Serves an echo on every connection, until it is killed."""
    listener = listen(port)
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=echo, args=(stream,), daemon=True).start()


def echo(stream):
    with stream:
        try:
            while data := stream.recv(65536):
                stream.sendall(data)
        except OSError:
            pass


def do_refused(*ports):
    """Says how a connection to each port fails, and how long that took."""
    for port in ports:
        start = time.monotonic()
        try:
            connect(port)
            result = "connected"
        except OSError as failure:
            result = errno.errorcode[failure.errno]
        print(result, time.monotonic() - start)


def do_hold(port):
    """Connects, sends a word and waits for the stream's end."""
    stream = connect(port)
    stream.sendall(b"held")
    try:
        while stream.recv(4096):
            pass
        print("end")
    except OSError as failure:
        print(errno.errorcode[failure.errno])


def do_port(port):
    """Connects, says which port it has itself, and waits for the stream's end."""
    with connect(port) as stream:
        print(stream.getsockname()[1], flush=True)
        stream.recv(1)


def do_http(port):
    """Serves HTTP: every path is a text of its own."""
    import http.server
    import socketserver

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"{self.headers['Host']}{self.path} in the guest\n".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self):
            return "vsock"

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_VSOCK

    Server((socket.VMADDR_CID_ANY, int(port)), Handler).serve_forever()


class SoakEnd:
    """The guest's end of one connection of the soak; `tests/soak/ends.rs` does the same for the host."""

    STRIDE = 104_729
    ENDLESS = 256 << 20

    def __init__(self, line, patterns):
        self.line = f"connection {line.strip()}"
        words = iter(line.split())
        self.number, self.kind, self.opener, self.port, self.delay = int(next(words)), next(words), next(words), next(words), float(next(words))
        self.mine, self.theirs = SoakPart(words), SoakPart(words)
        self.patterns = patterns
        self.start = self.number * self.STRIDE
        self.listener = listen(self.port) if self.opener == "Host" else None
        self.failures = []

    def run(self):
        try:
            self.play()
        except OSError as failure:
            self.fail(f"{failure}")

    def fail(self, what):
        self.failures.append(f"{self.line}: {what}")

    def play(self):
        time.sleep(self.delay)
        if self.kind == "Refused":
            return self.be_refused()
        stream = self.listener.accept()[0] if self.listener else connect(self.port)
        with stream:
            if self.mine.ending == "Close":
                return self.send(stream)
            sender = threading.Thread(target=self.send_and_finish, args=(stream,))
            sender.start()
            self.receive(stream)
            sender.join()

    def be_refused(self):
        try:
            connect(self.port)
        except (ConnectionResetError, ConnectionRefusedError):
            return
        self.fail("connected to nobody")

    def send_and_finish(self, stream):
        self.send(stream)
        try:
            stream.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The other end was quicker.

    def send(self, stream):
        sizes = random.Random(self.number)
        endless = self.mine.ending == "Endless"
        total = self.ENDLESS if endless else self.mine.size
        sent = 0
        try:
            while sent < total:
                size = min(int(self.mine.write ** sizes.random()), total - sent)
                sent += stream.send(self.patterns[0].at(self.start + sent, size))
        except OSError as failure:
            if self.theirs.ending != "Close" or failure.errno not in (errno.EPIPE, errno.ECONNRESET):
                self.fail(f"after {sent} bytes sent: {failure}")
            return
        if endless:
            self.fail(f"{sent} bytes are taken although the other end has left")

    def receive(self, stream):
        sizes = random.Random(self.number)
        total, received, stall = self.theirs.size, 0, self.mine.stall
        while True:
            if received >= self.mine.stall_at:
                time.sleep(stall)
                stall = 0
            try:
                data = stream.recv(int((1 << 17) ** sizes.random()))
            except OSError as failure:
                # Linux says ENOTCONN behind a close that came before our own shutdown.
                if self.theirs.ending != "Close" or failure.errno not in (errno.ECONNRESET, errno.ENOTCONN):
                    self.fail(f"after {received} bytes received: {failure}")
                    return
                break
            if not data:
                break
            expected = self.patterns[1].at(self.start + received, len(data))
            if data != expected:
                differs = next(i for i, (a, b) in enumerate(zip(data, expected)) if a != b)
                return self.fail(f"a wrong byte at offset {received + differs}")
            received += len(data)
        if received != total:
            self.fail(f"ended after {received} of {total} bytes")


class SoakPart:
    """What one end does, from the words of a plan."""

    def __init__(self, words):
        self.size, self.write, self.stall_at = int(next(words)), int(next(words)), int(next(words))
        self.stall, self.ending = float(next(words)), next(words)


def do_soak(ready, plans):
    """Plays the guest's ends of the connections in the file `plans`, a line each; connects to port `ready` before."""
    patterns = Pattern("guest"), Pattern("host")
    with open(plans) as lines:
        ends = [SoakEnd(line, patterns) for line in lines]
    connect(ready).close()
    run_all([(end.run, ()) for end in ends])
    failures = [failure for end in ends for failure in end.failures]
    if failures:
        sys.exit("\n".join(failures))


globals()[f"do_{sys.argv[1]}"](*sys.argv[2:])

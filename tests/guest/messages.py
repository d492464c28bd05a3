"""Either end of a test with messages, with nothing but Python's own SOCK_SEQPACKET sockets. `messages.py TASK ADDRESS ARGUMENT...`;
see the functions named do_…

An ADDRESS is a port of AF_VSOCK that is listened on for one connection, the CID:PORT or the path of a Unix socket that is called,
PATH=PORT, where CONNECT is said to the daemon at PATH, or listen=PATH.
"""

import errno
import random
import select
import socket
import sys
import threading
import time

SIZES = [1, 2, 43, 44, 45, 1000, 3731, 3732, 3733, 4096, 16_385, 32_768, 32_769, 65_535, 65_536, 65_537, 131_073, 200_000, 262_143, 262_144]
PATIENCE = 20


def new_socket(family):
    end = socket.socket(family, socket.SOCK_SEQPACKET)
    if family == socket.AF_UNIX:
        # For the longest messages.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 300_000)
    return end


def connect_soon(family, address):
    """Connects as soon as a program listens there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        end = new_socket(family)
        try:
            end.connect(address)
            return end
        except (ConnectionResetError, ConnectionRefusedError, FileNotFoundError):
            end.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def dial(path, port):
    """Asks the daemon for a port of the guest's as soon as a program listens there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        end = connect_soon(socket.AF_UNIX, path)
        end.send(b"CONNECT %d\n" % int(port))
        try:
            answer = end.recv(100)
        except ConnectionResetError:
            answer = b""
        if answer:
            assert answer.startswith(b"OK ") and answer.endswith(b"\n"), answer
            return end
        end.close()
        if time.monotonic() > deadline:
            sys.exit(f"nobody listens on port {port}")
        time.sleep(0.02)


def accept(family, address):
    with new_socket(family) as listener:
        listener.bind(address)
        listener.listen(1)
        end = listener.accept()[0]
    if family == socket.AF_UNIX:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 300_000)
    return end


def meet(address):
    """The one connection of this address."""
    if address.startswith("listen="):
        return accept(socket.AF_UNIX, address.removeprefix("listen="))
    if "=" in address:
        return dial(*address.split("="))
    if address.startswith("/"):
        return connect_soon(socket.AF_UNIX, address)
    if ":" in address:
        cid, port = address.split(":")
        return connect_soon(socket.AF_VSOCK, (int(cid), int(port)))
    return accept(socket.AF_VSOCK, (socket.VMADDR_CID_ANY, int(address)))


def messages(name, count):
    """The messages of this name: each size once, and `count` of any size."""
    dice = random.Random(name)
    sizes = SIZES + [int(262_144 ** dice.random()) for _ in range(count)]
    dice.shuffle(sizes)
    for size in sizes:
        yield dice.randbytes(size)


def send_all(end, name, count):
    for message in messages(name, count):
        sent = end.send(message)
        if sent != len(message):
            sys.exit(f"{sent} of {len(message)} bytes are sent")
    end.shutdown(socket.SHUT_WR)


def receive(end, size=1 << 20):
    """The next message, for which poll(2) waits."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        sys.exit("no message")
    return end.recv(size)


def do_exchange(address, mine, theirs, count):
    """Sends the messages of one name and compares those of the other, at once. Either end stops when it has sent all."""
    with meet(address) as end:
        sender = threading.Thread(target=send_all, args=(end, mine, int(count)))
        sender.start()
        for number, expected in enumerate(messages(theirs, int(count))):
            message = receive(end)
            if message != expected:
                sys.exit(f"message {number} has {len(message)} bytes, not {len(expected)}, or others")
        sender.join()
        if receive(end):
            sys.exit("a message behind the last one")


def do_say(address):
    """Sends messages, of which one ends a record, and receives the answer after its own end."""
    with meet(address) as end:
        end.send(b"0123456789" * 1000)
        end.send(b"second")
        end.send(b"record", socket.MSG_EOR)
        end.send(b"0123456789" * 1000)
        end.send(b"last")
        end.shutdown(socket.SHUT_WR)
        answer = receive(end), receive(end), receive(end)
        if answer != (b"first answer", b"second answer", b""):
            sys.exit(f"{answer}")


def do_truncate(address):
    """Reads less than the messages have, which costs the rest of each alone, and answers when they have ended."""
    with meet(address) as end:
        start, _, flags, _ = end.recvmsg(4)
        if start != b"0123" or not flags & socket.MSG_TRUNC:
            sys.exit(f"{start}, flags {flags}")
        whole, _, flags, _ = end.recvmsg(6)
        if whole != b"second" or flags & socket.MSG_TRUNC:
            sys.exit(f"{whole}, flags {flags}")
        if receive(end, 100) != b"record":
            sys.exit("no record")
        room = bytearray(3)
        size = end.recv_into(room, 3, socket.MSG_TRUNC)
        if size != 10_000 or room != b"012":
            sys.exit(f"{size} bytes: {room}")
        if receive(end, 4) != b"last" or receive(end) != b"":
            sys.exit("no end")
        end.send(b"first answer")
        end.send(b"second answer")


def do_echo(address):
    """Sends every message back, until the other end stops."""
    with meet(address) as end:
        while message := end.recv(1 << 20):
            end.send(message)


def do_hold(address):
    """Sends a message, and says how the connection ends."""
    with meet(address) as end:
        end.send(b"held")
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.poll()
        # A recv(2) that waits says only that it has ended (Linux 6.1).
        failure = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        print(errno.errorcode[failure] if failure else "end")


def do_flood(address, count):
    """Sends so many messages and closes at once."""
    with meet(address) as end:
        for number in range(int(count)):
            end.send(b"%06d" % number * 10_000)


def do_late(address, count):
    """Reads them later than Linux keeps a closed connection for: that is 8 s."""
    with meet(address) as end:
        time.sleep(10)
        for number in range(int(count)):
            message = receive(end)
            if message != b"%06d" % number * 10_000:
                sys.exit(f"message {number} has {len(message)} bytes: {message[:20]}")
        if receive(end):
            sys.exit("a message behind the last one")


globals()[f"do_{sys.argv[1]}"](*sys.argv[2:])
print("done")

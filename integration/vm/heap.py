"""A sandbox with a server whose memory is known page by page."""

import hashlib
import random
import struct

from test_armed_restore import Sandbox

PAGE = 4096

SERVER = f"""
import hashlib, mmap, random, signal, socket, struct, sys
pages = int(sys.argv[1])
heap = mmap.mmap(-1, pages * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def write(number, version):
    heap[number * {PAGE}:(number + 1) * {PAGE}] = struct.pack("<II", number, version) * {PAGE // 8}
def some(seed, count):
    for number in random.Random(seed).sample(range(pages), count):
        write(number, seed)
signals = 0
def signaled(*_):
    global signals
    signals += 1
    write(0, 1000 + signals)
    open("/dev/shm/written", "w").close()
signal.signal(signal.SIGUSR1, signaled)
for number in range(pages):
    write(number, 0)
server = socket.socket(socket.AF_UNIX)
server.bind("\\0server")
server.listen()
while True:
    client, _ = server.accept()
    with client:
        verb, *numbers = client.recv(100).decode().split()
        if verb == "some":
            some(*map(int, numbers))
        elif verb == "clear":
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("4")
        client.sendall(hashlib.sha256(heap).hexdigest().encode() if verb == "hash" else b"done")
"""
ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect("\\0server")
    client.sendall(sys.argv[1].encode())
    print(client.recv(1000).decode())
"""
START = 'nohup python3 -c "$1" "$2" >/dev/null 2>&1 & until grep -q @server /proc/net/unix; do sleep 0.1; done'


class Model:
    """What the memory must be."""

    def __init__(self, pages):
        self.pages = [0] * pages

    def some(self, seed, count):
        for number in random.Random(seed).sample(range(len(self.pages)), count):
            self.pages[number] = seed

    def hash(self):
        digest = hashlib.sha256()
        for number, version in enumerate(self.pages):
            digest.update(struct.pack("<II", number, version) * (PAGE // 8))
        return digest.hexdigest()


class Chained(Sandbox):
    """A sandbox with such a server, and the model of it."""

    def __init__(self, directory, pages, **kwargs):
        super().__init__("ctr", directory, **kwargs)
        self.model = Model(pages)

    def serve(self):
        self.exec("sh", "-c", START, "sh", SERVER, str(len(self.model.pages)))
        return self.last()

    def say(self, words, first=":"):
        return self.exec("sh", "-c", f'{first}; exec python3 -c "$1" "$2"', "sh", ASK, words).out.strip()

    def some(self, seed, count, first=":"):
        """Writes to so many pages in a turn of its own, after a command; returns its line in the journal."""
        assert self.say(f"some {seed} {count}", first) == "done"
        self.model.some(seed, count)
        return self.last()

    def last(self):
        """The line of the last turn, once it is durable."""
        self.settled()
        return self.turns()[-1]

    def check(self):
        assert self.say("hash") == self.model.hash()

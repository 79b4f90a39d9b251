"""The frames between run.py on the host and agent.py in the node, over a virtio-serial port.

A frame is a type (1 byte), a length (4 bytes, big endian) and so many bytes. A port has no notion of
a connection, so each client starts with HELLO, which carries a magic word and a nonce: the agent
looks for the magic word whatever came before it, and the client for its own nonce.
"""

import struct

MAGIC = b"\x00chsnap-node\xff\x01\x02\x00"
PORT = "chsnap.node."  # and a number
PORTS = 4
LIMIT = 16384  # bytes of a frame

HELLO, REQUEST, INPUT, INPUT_END, SIZE, SIGNAL = b"H", b"R", b"I", b"Z", b"W", b"S"
READY, OUTPUT, ERROR, EXIT, BEAT, FAILED = b"h", b"o", b"e", b"x", b"b", b"f"
TO_NODE = HELLO + REQUEST + INPUT + INPUT_END + SIZE + SIGNAL
TO_HOST = READY + OUTPUT + ERROR + EXIT + BEAT + FAILED


class Garbled(Exception):
    """What came is no frame: the other end has changed, or a part of it got lost."""


def frame(kind, data=b""):
    return kind + struct.pack(">I", len(data)) + data


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self, kinds, hello):
        self.kinds, self.hello, self.buffer, self.synced = kinds, hello, bytearray(), False

    def reset(self):
        self.buffer.clear()
        self.synced = False

    def feed(self, data):
        self.buffer += data
        while True:
            if not self.synced:
                at = self.buffer.find(self.hello)
                if at < 0:
                    # What is kept is only what may be the beginning of it.
                    del self.buffer[: max(0, len(self.buffer) - len(self.hello))]
                    return
                del self.buffer[:at]
                self.synced = True
            if len(self.buffer) < 5:
                return
            kind, (length,) = bytes(self.buffer[:1]), struct.unpack(">I", self.buffer[1:5])
            if kind not in self.kinds or length > LIMIT:
                del self.buffer[:1]
                self.synced = False
                raise Garbled(f"a frame of kind {kind!r} with {length} bytes")
            if len(self.buffer) < 5 + length:
                return
            data = bytes(self.buffer[5 : 5 + length])
            del self.buffer[: 5 + length]
            yield kind, data

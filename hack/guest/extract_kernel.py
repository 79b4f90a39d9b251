#!/usr/bin/env python3
"""Turn a distribution's vmlinuz into what a VMM loads directly.

    extract_kernel.py <vmlinuz> <output>

x86: the uncompressed ELF vmlinux inside a bzImage (PVH boot, no decompression in the guest).
arm64: the flat Image, which may be plain, gzip'ed or inside an EFI zboot file.
A file that is already an ELF vmlinux or an Image is copied as it is.
"""

import gzip
import lzma
import os
import struct
import subprocess
import sys

ELF = b"\x7fELF"
ARM64_MAGIC = b"ARM\x64"  # at offset 56 of an Image


class NotAKernel(Exception):
    pass


def through(command, data):
    """A decompressor that stops by itself at the payload's end may complain about what follows."""
    done = subprocess.run(command, input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout


def un_xz(data):
    return lzma.LZMADecompressor().decompress(data)


def un_gzip(data):
    import zlib

    return zlib.decompressobj(wbits=31).decompress(data)


# magic, name, decompressor
FORMATS = [
    (b"\x28\xb5\x2f\xfd", "zstd", lambda d: through(["zstd", "-dcq"], d)),
    (b"\xfd7zXZ\x00", "xz", un_xz),
    (b"\x1f\x8b\x08", "gzip", un_gzip),
    (b"\x02\x21\x4c\x18", "lz4", lambda d: through(["lz4", "-dcq"], d)),
    (b"\x5d\x00\x00", "lzma", lambda d: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(d)),
]


def is_image(data):
    return data[56:60] == ARM64_MAGIC


def from_bzimage(data):
    """The boot protocol's header says where the payload is (fields payload_offset/_length)."""
    (setup_sects,) = struct.unpack_from("<B", data, 0x1F1)
    (version,) = struct.unpack_from("<H", data, 0x206)
    if version < 0x0208:
        raise NotAKernel(f"boot protocol {version:#x} is older than 2.08 and has no payload field")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((setup_sects or 4) + 1) * 512 + offset
    payload = data[start : start + length]
    for magic, name, decompress in FORMATS:
        if payload.startswith(magic):
            out = decompress(payload)
            if not out.startswith(ELF):
                raise NotAKernel(f"the {name} payload does not hold an ELF file")
            return out
    raise NotAKernel(f"the payload is compressed in an unknown way (starts with {payload[:6].hex()})")


def from_zboot(data):
    """EFI zboot: 'MZ', 'zimg', payload offset and size, and the compression's name at 24."""
    offset, size = struct.unpack_from("<II", data, 8)
    name = data[24:56].split(b"\0", 1)[0].decode("ascii", "replace")
    payload = data[offset : offset + size]
    for _, known, decompress in FORMATS:
        if known == name.replace("zstd22", "zstd"):
            return decompress(payload)
    raise NotAKernel(f"EFI zboot payload compressed with {name}")


def extract(data):
    if data.startswith(ELF) or is_image(data):
        return data
    if data[0x202:0x206] == b"HdrS":
        return from_bzimage(data)
    if data[4:8] == b"zimg":
        return extract(from_zboot(data))
    if data.startswith(b"\x1f\x8b"):
        return extract(gzip.decompress(data))
    raise NotAKernel("neither an ELF vmlinux, a bzImage, an arm64 Image nor an EFI zboot file")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, output = sys.argv[1:]
    with open(source, "rb") as f:
        data = f.read()
    try:
        out = extract(data)
    except NotAKernel as e:
        sys.exit(f"extract_kernel.py: {source}: {e}")
    with open(output + ".new", "wb") as f:
        f.write(out)
    os.replace(output + ".new", output)


if __name__ == "__main__":
    main()

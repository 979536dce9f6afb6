#!/bin/sh
# Makes the seeds of fuzz/corpus/layer anew: archives of GNU tar in each of its formats, and
# hostile ones, made block by block.
#
#   fuzz/seeds.sh [DIRECTORY]
#
# As root, for owners and devices; needs GNU tar and python3. What fuzzing found has names
# of its own and stays.
set -eu
out=${1:-$(dirname "$0")/corpus/layer}
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
mkdir -p "$out" "$work/tree" "$work/sparse" "$work/owners" "$work/times" "$work/xattrs" "$work/links" "$work/white/d" \
  "$work/devices" "$work/long"
cd "$work"

# What every format holds.
mkdir tree/d
printf 'text\n' > tree/d/file
ln tree/d/file tree/hard
ln -s d/file tree/soft
ln -s ../../outside tree/up
chmod 4711 tree/d/file
chmod 2755 tree/d
# Holes at the beginning, in the middle and at the end.
truncate -s 300000 sparse/holes
printf middle | dd of=sparse/holes bs=1 seek=120000 conv=notrunc status=none
printf x > sparse/dense
# IDs that need more than octal digits; sub-second times, before 1970 and after 2038.
printf x > owners/big
chown 4000000:4200000000 owners/big
printf x > times/nano
touch -d '2001-02-03 04:05:06.123456789 UTC' times/nano
printf x > times/old
touch -d '1960-01-01 00:00:00.5 UTC' times/old
printf x > times/late
touch -d '2050-01-01 UTC' times/late
touch -d @1000000000 times
printf x > xattrs/file
python3 -c '
import os
for name, value in [("user.text", b"a=b c"), ("user.binary", b"\n\0\xff="), ("user.empty", b""),
                    ("security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))]:
    os.setxattr("xattrs/file", name, value)
'
printf x > links/first
for name in a b c; do ln links/first "links/$name"; done
ln -s first links/soft
ln links/soft links/soft-too
printf x > white/d/kept
: > white/d/.wh..wh..opq
: > white/.wh.gone
mkfifo devices/pipe
mknod devices/null c 1 3
mknod devices/block b 259 1048575
name=$(printf 'n%.0s' $(seq 150))
mkdir -p "long/$name/$name"
printf x > "long/$name/$name/file"
ln -s "$name/$name/$name" long/soft

pack() {
  file=$1 from=$2
  shift 2
  case $* in *=pax*) set -- "$@" --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime ;; esac
  tar --create --file "$out/$file.tar" --blocking-factor=2 --sort=name --directory "$from" --mtime="${time:-@1000000000}" \
    --numeric-owner "$@" .
}
for format in v7 oldgnu gnu ustar pax; do
  pack "plain-$format" tree --format="$format" --owner=0 --group=0
done
for format in oldgnu gnu; do
  pack "sparse-$format" sparse --format="$format" --sparse --owner=0 --group=0
done
for version in 0.0 0.1 1.0; do
  pack "sparse-pax-$version" sparse --format=pax --sparse --sparse-version="$version" --owner=0 --group=0
done
for format in gnu pax; do
  pack "owners-$format" owners --format="$format"
  pack "long-$format" long --format="$format" --owner=0 --group=0
  time=@4000000000 pack "times-$format" times --format="$format" --owner=0 --group=0 --clamp-mtime
done
pack xattrs-pax xattrs --format=pax --xattrs --xattrs-include='*' --owner=0 --group=0
pack links-gnu links --format=gnu --owner=0 --group=0
pack whiteouts-ustar white --format=ustar --owner=0 --group=0
pack devices-gnu devices --format=gnu --owner=0 --group=0

PYTHONDONTWRITEBYTECODE=1 python3 - "$out" <<'PYTHON'
import sys

out = sys.argv[1]


def header(kind, name, size=0, link="", mode=0o644, **fields):
    block = bytearray(512)

    def put(at, length, value):
        value = value if isinstance(value, bytes) else value.encode()
        block[at : at + length] = value[:length].ljust(length, b"\0")

    put(0, 100, name)
    put(100, 8, "%07o" % mode)
    put(108, 8, fields.get("uid", "0000000"))
    put(116, 8, "0000000")
    put(124, 12, fields.get("size_text", "%011o" % size))
    put(136, 12, fields.get("mtime", "07346545000"))
    put(156, 1, kind)
    put(157, 100, link)
    put(257, 8, "ustar\x0000")
    put(329, 8, "%07o" % fields.get("major", 0))
    put(337, 8, "%07o" % fields.get("minor", 0))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(kind, name, content=b"", **fields):
    padded = content + b"\0" * (-len(content) % 512)
    return header(kind, name, len(content), **fields) + padded


def records(*pairs):
    data = b""
    for key, value in pairs:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        data += str(length).encode() + rest
    return data


def pax(*pairs, kind="x"):
    return entry(kind, "PaxHeaders.0/x", records(*pairs))


file = entry("0", "f", b"x")
deep = "/".join(["d"] * 49) + "/f"
seeds = {
    "dotdot": entry("0", "../outside/canary", b"x"),
    "dotdot-inside": entry("0", "a/../../outside/canary", b"x"),
    "dotdot-pax": pax((b"path", b"../outside/canary")) + file,
    "absolute": entry("0", "/etc/f", b"x") + entry("5", "//a/./b/"),
    "link-up": entry("2", "up", link="../../outside") + entry("0", "up/canary", b"x"),
    "link-absolute": entry("2", "up", link="/outside") + entry("0", "up/canary", b"x"),
    "link-loop": entry("2", "a", link="b") + entry("2", "b", link="a") + entry("0", "a/f", b"x"),
    "link-replaced": entry("2", "f", link="../outside/canary") + file,
    "link-is-directory": entry("2", "d", link="../outside") + entry("5", "d/") + entry("0", "d/canary", b"x"),
    "hardlink-outside": entry("1", "h", link="../outside/canary"),
    "hardlink-through-link": entry("2", "s", link="../outside") + entry("1", "h", link="s/canary"),
    "hardlink-itself": file + entry("1", "f", link="./f"),
    "hardlink-lower": entry("1", "h", link="lower"),
    "hardlink-mode": file + entry("1", "h", link="f", mode=0o4711),
    "hardlink-directory": entry("5", "d/") + entry("1", "h", link="d"),
    "device-zero": entry("3", "zero", major=0, minor=0),
    "device-block": entry("4", "sda", major=8, minor=0),
    "whiteout-nothing": entry("0", ".wh."),
    "whiteout-dots": entry("0", "a/.wh..."),
    "whiteout-root": entry("0", ".wh..wh..opq"),
    "whiteout-own": file + entry("0", ".wh.f"),
    "whiteout-then-own": entry("0", ".wh.d") + entry("5", "d/") + entry("0", "d/f", b"x"),
    "whiteout-directory": entry("0", ".wh.a/b", b"x"),
    "opaque-late": entry("0", "d/f", b"x") + entry("0", "d/.wh..wh..opq") + entry("5", "d/"),
    "aufs": entry("5", ".wh..wh.plnk/") + entry("0", ".wh..wh.plnk/1.2", b"x"),
    "twice": file + entry("0", "f", b"yy") + entry("5", "f/") + entry("0", "f/g", b"z"),
    "file-as-parent": file + entry("0", "f/g", b"x"),
    "closed-directory": entry("5", "d/", mode=0) + entry("0", "d/f", b"x"),
    "implied": entry("0", deep, b"x"),
    "xattr-overlay": pax((b"SCHILY.xattr.user.overlay.opaque", b"y")) + entry("5", "d/"),
    "xattr-trusted": pax((b"SCHILY.xattr.trusted.overlay.redirect", b"/x")) + entry("5", "d/"),
    "xattr-long": pax((b"SCHILY.xattr.user.x", b"v" * 3000)) + file,
    "pax-global": pax((b"path", b"evil"), (b"mtime", b"7"), kind="g") + file,
    "pax-size": pax((b"size", b"513")) + header("0", "f") + b"y" * 513 + b"\0" * 511,
    "pax-size-huge": pax((b"size", b"99999999999999999999")) + file,
    "pax-mtime": pax((b"mtime", b"-1.5")) + file,
    "pax-uid": pax((b"uid", b"4294967295")) + file,
    "pax-length": entry("x", "p", b"999 path=a\n") + file,
    "pax-no-newline": entry("x", "p", b"8 path=a") + file,
    "pax-zero": entry("x", "p", b"0 path=a\n") + file,
    "pax-nul": pax((b"path", b"a\0b")) + file,
    "pax-twice": pax((b"path", b"a")) + pax((b"path", b"b")) + file,
    "pax-alone": pax((b"path", b"a")),
    "gnu-long": entry("L", "././@LongLink", b"long name\0") + entry("K", "././@LongLink", b"long target\0") + entry("2", "s", link="t"),
    "gnu-long-empty": entry("L", "././@LongLink", b"\0") + file,
    "sparse-bomb": pax((b"GNU.sparse.size", b"64424509440"), (b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.map", b"0,0")) + entry("0", "f"),
    "sparse-overlap": pax((b"GNU.sparse.size", b"100"), (b"GNU.sparse.numblocks", b"2"), (b"GNU.sparse.map", b"0,50,10,50")) + entry("0", "f", b"y" * 100),
    "sparse-beyond": pax((b"GNU.sparse.size", b"10"), (b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.map", b"5,10")) + entry("0", "f", b"y" * 10),
    "sparse-1.0-cut": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"f"), (b"GNU.sparse.realsize", b"10")) + entry("0", "f", b"1\n0\n"),
    "cut-header": file[:100],
    "cut-entry": file[:600],
    "checksum": b"g" + file[1:],
    "zero-block": file + b"\0" * 512 + file,
    "type-unknown": entry("V", "label"),
    "link-has-size": header("5", "d/", size_text="00000001000") + file,
    "garbage-behind": file + b"\0" * 1024 + b"garbage" * 100,
}
lie = bytearray(header("0", "f"))
for name, size in [("size-negative", b"\xff" * 12), ("size-base256", b"\x80" + b"\0" * 10 + b"\1"), ("size-lies", b"00000777777\0"), ("size-no-number", b"xxxxxxxxxxx\0")]:
    lie[124:136] = size
    lie[148:156] = b" " * 8
    lie[148:156] = b"%06o\0 " % sum(lie)
    seeds[name] = bytes(lie) + b"x" + b"\0" * 511
for name, data in seeds.items():
    whole = name.startswith(("cut-", "pax-alone", "garbage"))
    with open(f"{out}/hostile-{name}.tar", "wb") as to:
        to.write(data if whole else data + b"\0" * 1024)
PYTHON

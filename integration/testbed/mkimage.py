#!/usr/bin/env python3
"""mkimage.py ROOTDIR NAME:TAG OUT.tar [--upper DIR]...

Makes a container image out of a root directory, without any registry: ROOTDIR is the first layer, each --upper
(the upper directory of an overlay mount on top of what came before) one more. OUT.tar is an OCI image layout
that also has Docker's manifest.json, so `ctr image import` and `docker load` both take it. The same directories
give the same bytes.
"""
import argparse
import hashlib
import io
import json
import os
import stat
import tarfile
import tempfile

OPAQUE = "trusted.overlay.opaque"
EPOCH = "2025-01-01T00:00:00Z"  # any constant: an image's creation time must not change its digest


def walk(top):
    """Every path below top, relative to it, parents first, sorted."""
    for directory, dirs, files in os.walk(top):
        dirs.sort()
        for name in sorted(dirs + files):
            yield os.path.relpath(os.path.join(directory, name), top)


def xattrs(path):
    """The attributes that belong to the file, not to the overlay it was made in, as PAX headers."""
    found = {}
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        if not name.startswith("trusted."):
            value = os.getxattr(path, name, follow_symlinks=False)
            found["SCHILY.xattr." + name] = value.decode("utf-8", "surrogateescape")
    return found


def empty(name):
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    return info


def write_layer(top, out, is_first):
    """Writes the layer's tar to the binary file out. Overlay's whiteouts become OCI's `.wh.` entries."""
    links = {}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in walk(top):
            path = os.path.join(top, name)
            st = os.lstat(path)
            if stat.S_ISSOCK(st.st_mode):
                continue
            if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
                if not is_first:
                    head, tail = os.path.split(name)
                    tar.addfile(empty(os.path.join(head, ".wh." + tail)))
                continue
            tar.inodes = {}  # tarfile's own idea of hard links keeps inodes of files it never saw again
            info = tar.gettarinfo(path, arcname=name)
            info.uname = info.gname = ""
            info.mtime = int(st.st_mtime)
            info.pax_headers = xattrs(path)
            if stat.S_ISREG(st.st_mode) and st.st_nlink > 1:
                first = links.setdefault((st.st_dev, st.st_ino), name)
                if first != name:
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, first, 0
            if info.isreg():
                with open(path, "rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
            if info.isdir() and not is_first and OPAQUE in os.listxattr(path):
                tar.addfile(empty(os.path.join(name, ".wh..wh..opq")))


def sha256(file):
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def encode(thing):
    return json.dumps(thing, sort_keys=True, separators=(",", ":")).encode()


class Layout:
    """The image tar under construction."""

    def __init__(self, tar):
        self.tar = tar

    def add(self, name, file):
        info = empty(name)
        info.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.tar.addfile(info, file)

    def blob(self, file, media_type):
        digest = sha256(file)
        self.add("blobs/sha256/" + digest, file)
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": file.seek(0, os.SEEK_END)}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("root")
    args.add_argument("name")
    args.add_argument("out")
    args.add_argument("--upper", action="append", default=[])
    args = args.parse_args()
    part = args.out + ".part"
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        layout = Layout(tar)
        layers = []
        for number, top in enumerate([args.root] + args.upper):
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(args.out))) as file:
                write_layer(top, file, number == 0)
                layers.append(layout.blob(file, "application/vnd.oci.image.layer.v1.tar"))
        digests = [layer["digest"] for layer in layers]
        config = layout.blob(io.BytesIO(encode({
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
            "os": "linux",
            "created": EPOCH,
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/bash"],
            },
            "rootfs": {"type": "layers", "diff_ids": digests},
            "history": [{"created": EPOCH, "created_by": "mkimage.py"} for _ in layers],
        })), "application/vnd.oci.image.config.v1+json")
        manifest = layout.blob(io.BytesIO(encode({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        })), "application/vnd.oci.image.manifest.v1+json")
        manifest["annotations"] = {
            "io.containerd.image.name": args.name,
            "org.opencontainers.image.ref.name": args.name.rpartition(":")[2],
        }
        layout.add("index.json", io.BytesIO(encode({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [manifest]})))
        layout.add("oci-layout", io.BytesIO(encode({"imageLayoutVersion": "1.0.0"})))
        layout.add("manifest.json", io.BytesIO(encode([{
            "Config": "blobs/sha256/" + config["digest"][7:],
            "RepoTags": [args.name],
            "Layers": ["blobs/sha256/" + digest[7:] for digest in digests],
        }])))
    os.rename(part, args.out)


if __name__ == "__main__":
    main()

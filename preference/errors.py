"""Errors that are written for a user: the base of all of them, and what the operating system refuses, as a sentence."""

from __future__ import annotations

import errno


class PreferenceError(Exception):
    """Something that the user can put right: str() is one clear sentence that says what, where and what to type.

    Scripts print it as it is; any other exception is a fault of the program and keeps its traceback.
    """


ADVICE = {
    errno.ENOSPC: "free some space, or set {folders} to another disk",
    errno.EDQUOT: "your quota is used up: free some space, or set {folders} to another disk",
    errno.EFBIG: "no file may be so large here: set {folders} to another disk, or raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: set {folders} to a place that can be written to",
    errno.EACCES: "set {folders} to a place of yours, or change the permissions",
    errno.EPERM: "set {folders} to a place of yours, or change the permissions",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "the links there lead in a circle: name the file or folder itself",
    errno.ENOENT: "it is not there, or no longer: look whether something moved or deleted it",
    errno.ENOTDIR: "a part of this path is a file: name a folder, or set {folders} to another",
    errno.EISDIR: "name a file: this is a folder",
    errno.EEXIST: "something else lies there: set {folders} to another place",
    errno.ENOTEMPTY: "something else lies there: set {folders} to another place",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENOMEM: "the machine has no memory left: end other programs, or take a smaller model",
    errno.EIO: "the disk or its connection fails",
    errno.ESTALE: "the disk or its connection fails",
    errno.ETXTBSY: "another program uses it: end that first",
    errno.EBUSY: "another program uses it: end that first",
    errno.EPIPE: "what read the output has left",
}


def of_the_system(error: BaseException, folders: str) -> str | None:
    """What the operating system refused, in a sentence with the way out; None for everything else.

    Args:
        folders: the flags that say where the program writes.
    """
    if not isinstance(error, OSError) or error.errno not in ADVICE:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}: {ADVICE[error.errno].format(folders=folders)}"

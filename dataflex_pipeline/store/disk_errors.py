"""Errors of the disk, in words."""

from __future__ import annotations

import errno

from dataflex_pipeline.errors import DataflexError, UserError


def disk_error(error: BaseException) -> DataflexError | None:
    """Return the error to show when the disk is behind an exception; None where something else is.

    A full disk, a quota or a file-size limit, a failing disk, a folder that is read-only or not ours.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = getattr(seen, "errno", None)
        text = str(seen)
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # Libraries written in Rust put the system's number into the text only.
        if code in full or any(f"os error {number})" in text for number in full) or "No space left" in text:
            return DataflexError(
                f"A file could not be written: {text.splitlines()[0]}",
                "The disk is full, or a quota or file-size limit was reached.",
                "Free some space and run the same command again: finished work is kept, nothing is damaged.",
            )
        if code in (errno.EIO, errno.ESTALE) and isinstance(seen, OSError):
            return DataflexError(
                f"The disk or the shared folder does not answer as it should: {text.splitlines()[0]}",
                "A device failed, or the server of a network folder is gone or has started anew.",
                "Bring it back and run the same command again: finished work is kept.",
            )
        if code in (errno.EROFS, errno.EACCES, errno.EPERM) and isinstance(seen, OSError):
            return DataflexError(
                f"A file could not be opened: {text.splitlines()[0]}",
                "The folder is read-only, or belongs to another user.",
                "Make it writable for this user, or choose another place with runs_dir=FOLDER (for shared "
                "features: features_dir=FOLDER), and run the same command again: finished work is kept.",
            )
        if code in (errno.ENAMETOOLONG, errno.ELOOP) and isinstance(seen, OSError):
            name = str(seen.filename or "")
            return UserError(
                f"The path {name[:60]}{'...' if len(name) > 60 else ''} cannot be used.",
                "Its links lead in a circle." if code == errno.ELOOP else "It, or a name in it, is too long.",
                "Give another path or name.",
            )
        seen = seen.__cause__ or seen.__context__
    return None

//! Names of whiteouts, and what names mean in a layer; used by both directions.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts>

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Begins the name of a whiteout. No file in an image can have such a name.
pub const PREFIX: &str = ".wh.";

/// The name of the file that makes its directory opaque.
pub const OPAQUE: &str = ".wh..wh..opq";

/// Begins names that AUFS kept its books under, and that mean nothing in an image.
const AUFS_PREFIX: &str = ".wh..wh.";

/// Extended attribute of an opaque directory in a tree, and its value: the form that an
/// overlay mounted with `userxattr` reads.
///
/// <https://docs.kernel.org/filesystems/overlayfs.html#whiteouts-and-opaque-directories>
pub const OPAQUE_XATTR: (&str, &[u8]) = ("user.overlay.opaque", b"y");

/// What the last component of an entry's name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning<'n> {
    /// The file itself.
    File,
    /// The sibling of this name is removed.
    Whiteout(&'n OsStr),
    /// The directory it is in is opaque.
    Opaque,
    /// Bookkeeping of AUFS in old images: to be passed over.
    Aufs,
    /// A whiteout of nothing, of `.` or of `..`: an attack or a mistake.
    Invalid,
}

/// Says what `name`, one component, means.
pub fn meaning(name: &OsStr) -> Meaning<'_> {
    let bytes = name.as_bytes();
    let Some(rest) = bytes.strip_prefix(PREFIX.as_bytes()) else {
        return Meaning::File;
    };
    if bytes == OPAQUE.as_bytes() {
        Meaning::Opaque
    } else if bytes.starts_with(AUFS_PREFIX.as_bytes()) {
        Meaning::Aufs
    } else if matches!(rest, b"" | b"." | b"..") {
        Meaning::Invalid
    } else {
        Meaning::Whiteout(OsStr::from_bytes(rest))
    }
}

/// The name of the whiteout of `name`.
pub fn whiteout_of(name: &OsStr) -> OsString {
    OsString::from_vec([PREFIX.as_bytes(), name.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_specification_says() {
        for (name, expected) in [
            ("file", Meaning::File),
            (".wh", Meaning::File),
            (".who", Meaning::File),
            ("a.wh.b", Meaning::File),
            (".wh.file", Meaning::Whiteout(OsStr::new("file"))),
            (".wh..hidden", Meaning::Whiteout(OsStr::new(".hidden"))),
            (".wh....", Meaning::Whiteout(OsStr::new("..."))),
            (".wh..wh..opq", Meaning::Opaque),
            (".wh..wh.plnk", Meaning::Aufs),
            (".wh..wh.aufs", Meaning::Aufs),
            (".wh.", Meaning::Invalid),
            (".wh..", Meaning::Invalid),
            (".wh...", Meaning::Invalid),
        ] {
            assert_eq!(meaning(OsStr::new(name)), expected, "{name}");
        }
        assert_eq!(whiteout_of(OsStr::new("x")), ".wh.x");
    }
}

//! Unpacked layers ⇄ a mounted root filesystem. Knows nothing about archives.
//!
//! A [`Tree`] is one unpacked layer in overlay form: whiteouts are character
//! devices 0/0, opaque directories carry `user.overlay.opaque=y`. A [`Stack`] is a
//! list of trees looked at as one filesystem, without mounting anything. A
//! [`Rootfs`] is a mounted, writable one; what was changed in it is a new tree.

mod change;

pub use change::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, OpenFile, Time, order,
};

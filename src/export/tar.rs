//! `type=tar`: the root filesystem in a tar, or those of several platforms.

use std::path::Path;

use super::ExportError;
use super::file::{IsCancelled, write_whole};
use super::files::{Root, sorted};
use crate::layer;

/// Writes all files of `roots` as a tar to `dest`; `-` is standard output. Each of several
/// roots has to go to a directory of its own.
///
/// Owners, modes, extended attributes, hard links and devices are those of the image. The
/// order is that of paths, so the same files give the same bytes. Times are whole seconds;
/// with an `epoch` (seconds since 1970 UTC) all are that. A file appears under its name
/// when it is complete, or not at all.
///
/// # Errors
/// [`ExportError`].
pub fn root_tar(
    roots: &[Root],
    epoch: Option<i64>,
    dest: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<(), ExportError> {
    write_whole(dest, is_cancelled, |out| {
        let files = sorted(roots).into_iter().flat_map(|root| root.files(epoch));
        layer::write(files, None, out).map_err(ExportError::RootTar)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::export::testing::whole;
    use crate::rootfs::{Stack, tree_of};

    #[test]
    fn gnu_tar_sees_what_the_image_has() {
        let long = "n".repeat(120);
        let (_dir, tree) = tree_of(&[
            "755 d/",
            "4711 d/file = text",
            &format!("644 d/{long} = long"),
            "4711 d/same == d/file",
            "777 d/soft -> ../x",
            "600 pipe |",
        ]);
        let out = tempfile::tempdir().unwrap();
        let dest = out.path().join("root.tar");
        let stack = Stack::new(vec![tree]);
        root_tar(&whole(&stack), None, &dest, &|| false).unwrap();
        let first = fs::read(&dest).unwrap();
        root_tar(&whole(&stack), None, &dest, &|| false).unwrap();
        assert!(first == fs::read(&dest).unwrap());

        let output = Command::new("tar")
            .args(["--utc", "--full-time", "--numeric-owner", "-tvf"])
            .arg(&dest)
            .output()
            .unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let owner = format!("{}/{}", uid.as_raw(), gid.as_raw());
        // GNU tar pads sizes as it goes.
        let list: Vec<String> = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let time = "2014-05-13 16:53:20";
        assert_eq!(
            list,
            [
                format!("drwxr-xr-x {owner} 0 {time} d/"),
                format!("-rws--x--x {owner} 4 {time} d/file"),
                format!("-rw-r--r-- {owner} 4 {time} d/{long}"),
                format!("hrws--x--x {owner} 0 {time} d/same link to d/file"),
                format!("lrwxrwxrwx {owner} 0 {time} d/soft -> ../x"),
                format!("prw------- {owner} 0 {time} pipe"),
            ]
        );
    }

    #[test]
    fn platforms_have_directories_of_their_own() {
        let (_arm, arm) = tree_of(&["644 first = a", "644 same == first"]);
        let (_amd, amd) = tree_of(&["644 only = b"]);
        let root = |text, tree| Root {
            platform: crate::image::Platform::parse(text).unwrap(),
            in_directory: true,
            stack: Stack::new(vec![tree]),
        };
        let roots = [root("linux/arm64", arm), root("linux/amd64", amd)];
        let out = tempfile::tempdir().unwrap();
        let dest = out.path().join("root.tar");
        root_tar(&roots, None, &dest, &|| false).unwrap();
        let bytes = fs::read(&dest).unwrap();
        let mut archive = ::tar::Archive::new(&bytes[..]);
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let link = entry.link_name().unwrap().unwrap_or_default();
            format!("{} {}", entry.path().unwrap().display(), link.display())
        });
        assert_eq!(
            entries.collect::<Vec<_>>(),
            [
                "linux_amd64/ ",
                "linux_amd64/only ",
                "linux_arm64/ ",
                "linux_arm64/first ",
                "linux_arm64/same linux_arm64/first",
            ]
        );
    }
}

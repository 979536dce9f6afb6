//! Where one file goes: a name, a pipe, standard output.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::ExportError;

/// Names standard output.
const STDOUT: &str = "-";

/// How much is written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// Says whether the build was stopped.
pub type IsCancelled<'c> = &'c (dyn Fn() -> bool + 'c);

/// Whether a file can be written to `dest`, as far as that is to be seen before there is one.
///
/// # Errors
/// [`ExportError::Terminal`]; [`ExportError::Io`] for a directory.
pub fn check_file(dest: &Path) -> Result<(), ExportError> {
    if dest == Path::new(STDOUT) {
        return if io::stdout().is_terminal() {
            Err(ExportError::Terminal)
        } else {
            Ok(())
        };
    }
    if dest.is_dir() {
        let error = io::Error::from(io::ErrorKind::IsADirectory);
        return Err(ExportError::io("writing", dest)(error));
    }
    Ok(())
}

/// Gives `write` the file `dest` to write to; `-` is standard output.
///
/// A file appears under its name when it is complete, or not at all; what is no regular
/// file, such as a pipe, is written as it is.
pub(super) fn write_whole(
    dest: &Path,
    is_cancelled: IsCancelled<'_>,
    write: impl FnOnce(&mut dyn Write) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    check_file(dest)?;
    let write_to = |out: &mut dyn Write| {
        let checked = Checked {
            inner: out,
            is_cancelled,
        };
        let mut buffered = BufWriter::with_capacity(BUFFER_BYTES, checked);
        write(&mut buffered).map_err(|error| error.at(dest))?;
        buffered.flush().map_err(ExportError::io("writing", dest))
    };
    if dest == Path::new(STDOUT) {
        return write_to(&mut io::stdout().lock());
    }
    // A link keeps pointing at its file: that one is replaced, not the link.
    let resolved = fs::canonicalize(dest);
    let dest = resolved.as_deref().unwrap_or(dest);
    if fs::metadata(dest).is_ok_and(|found| !found.is_file()) {
        let mut file = File::options()
            .write(true)
            .open(dest)
            .map_err(ExportError::io("opening", dest))?;
        return write_to(&mut file);
    }
    let mut file = temporary_in(parent_of(dest))?;
    write_to(&mut file)?;
    persist(file, dest)
}

/// The directory that a path lies in.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file in `dir` that disappears unless it is given a name.
pub(super) fn temporary_in(dir: &Path) -> Result<tempfile::NamedTempFile, ExportError> {
    tempfile::Builder::new()
        .prefix(".sockless-")
        // What `open(2)` of a new file would give; the umask takes its part.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(dir)
        .map_err(ExportError::io("creating a file in", dir))
}

/// Gives a complete file its name.
pub(super) fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<(), ExportError> {
    file.persist(path)
        .map(drop)
        .map_err(|error| ExportError::io("naming", path)(error.error))
}

/// Fails when the build is stopped.
struct Checked<'w> {
    inner: &'w mut dyn Write,
    is_cancelled: IsCancelled<'w>,
}

impl Write for Checked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.is_cancelled)() {
            return Err(io::Error::other("stopped"));
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(dest: &Path, text: &str) -> Result<(), ExportError> {
        write_whole(dest, &|| false, |out| {
            out.write_all(text.as_bytes()).map_err(ExportError::Archive)
        })
    }

    #[test]
    fn what_stands_at_the_destination_is_respected() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let link = dir.path().join("link");
        fs::write(&real, "old").unwrap();
        symlink("real", &link).unwrap();
        write(&link, "new").unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("real"));

        let error = write(dir.path(), "new").unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!("writing {}: is a directory", dir.path().display())
        );

        // A pipe is written to and stays a pipe.
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read_to_string(pipe).unwrap()
        });
        write(&pipe, "through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
    }

    #[test]
    fn a_failure_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("file");
        fs::write(&dest, "old").unwrap();
        let error = write_whole(&dest, &|| false, |out| {
            out.write_all(b"half").unwrap();
            Err(ExportError::Terminal)
        });
        assert!(matches!(error, Err(ExportError::Terminal)));
        let error = write_whole(&dest, &|| true, |out| {
            out.write_all(b"half").map_err(ExportError::Archive)
        });
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error.unwrap_err())),
            format!("writing {}: stopped", dest.display())
        );
        assert_eq!(fs::read_to_string(&dest).unwrap(), "old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

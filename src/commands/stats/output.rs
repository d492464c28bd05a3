//! Replaces a file as a whole: a reader sees the old one or the new one.

use std::ffi::OsString;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process;

/// Everybody may read the file: node_exporter is another user.
const MODE: u32 = 0o644;

/// Writes `bytes` to a new file in the same directory, which then takes the place of the one at `path`.
///
/// # Errors
/// What the system says. The file at `path` is as it was then.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Some(name) = path.file_name() else {
        return Err(ErrorKind::IsADirectory.into());
    };
    // Hidden, and without the suffix that collectors look for.
    let mut new_name = OsString::from(".");
    new_name.push(name);
    new_name.push(format!(".{}.tmp", process::id()));
    let new = path.with_file_name(new_name);
    let written = write(&new, bytes).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // One that a dead process with this id has left.
    let _ = fs::remove_file(path);
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(MODE).open(path)?;
    // Whatever the umask.
    file.set_permissions(Permissions::from_mode(MODE))?;
    file.write_all(bytes)
}

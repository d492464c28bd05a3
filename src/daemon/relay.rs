//! A VMM whose connection was inherited, for the vhost-user library, which knows only VMMs that connect: its messages and
//! their descriptors are passed on, each whole, to a connection that the library accepts.

use std::env;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use log::warn;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::unistd::{close, mkdtemp};

use crate::syscalls::Syscall;

/// To pass on messages, parts of them and descriptors, and to end.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_recvmsg),
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_recvfrom),
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_close),
];

/// A message's header: request, flags, and the size of what follows, each of 4 bytes (vhost-user, Message).
const HEADER_LEN: usize = 12;
/// Where the size stands in it.
const SIZE: std::ops::Range<usize> = 8..12;
/// How many descriptors a message can have, and some more: the library is to refuse them.
const MAX_DESCRIPTORS: usize = 64;

/// The way between a VMM and the library.
pub struct Relay {
    vmm: UnixStream,
    library: UnixStream,
}

impl Relay {
    /// A way to `vmm`, and the socket where the library finds it. Nobody else can connect there: it has a name for a
    /// moment only, in a folder of our own.
    pub fn new(vmm: UnixStream) -> io::Result<(Self, UnixListener)> {
        // Whoever made it may have meant it for an event loop.
        vmm.set_nonblocking(false)?;
        let folder = mkdtemp(&env::temp_dir().join("vhost-user-vsock-XXXXXX"))?;
        let path = folder.join("vmm");
        let ends = UnixListener::bind(&path).and_then(|listener| {
            let library = UnixStream::connect(&path);
            fs::remove_file(&path)?;
            Ok((listener, library?))
        });
        fs::remove_dir(&folder)?;
        let (listener, library) = ends?;
        Ok((Self { vmm, library }, listener))
    }

    /// Passes messages on in both directions, in threads of their own, until either end closes.
    pub fn start(&self) -> io::Result<()> {
        for (name, from, to) in [
            ("from-vmm", &self.vmm, &self.library),
            ("to-vmm", &self.library, &self.vmm),
        ] {
            let (from, to) = (from.try_clone()?, to.try_clone()?);
            thread::Builder::new().name(name.into()).spawn(move || {
                if let Err(error) = pass_on(&from, &to) {
                    warn!("messages {name}: {error}");
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            })?;
        }
        Ok(())
    }
}

/// Passes messages on until there are no more.
fn pass_on(from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER_LEN];
        let mut filled = 0;
        while filled < HEADER_LEN {
            // Descriptors come with a message's first byte, and so they never leave with another's.
            let count = pass_part(from, to, &mut header[filled..])?;
            if count == 0 {
                return Ok(());
            }
            filled += count;
        }
        let mut size = [0; 4];
        size.copy_from_slice(&header[SIZE]);
        io::copy(&mut from.take(u32::from_le_bytes(size).into()), &mut to)?;
    }
}

/// Passes on what is there, up to what `part` holds, with its descriptors.
fn pass_part(from: &UnixStream, mut to: &UnixStream, part: &mut [u8]) -> io::Result<usize> {
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(part)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(from.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let count = message.bytes;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            descriptors.extend(rights);
        }
    }
    let sent = if descriptors.is_empty() {
        to.write_all(&part[..count])
    } else {
        let control = [ControlMessage::ScmRights(&descriptors)];
        let slices = [IoSlice::new(&part[..count])];
        sendmsg::<UnixAddr>(
            to.as_raw_fd(),
            &slices,
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)
        .and_then(|sent| to.write_all(&part[sent..count]))
    };
    for descriptor in descriptors {
        let _ = close(descriptor);
    }
    sent.map(|()| count)
}

//! Connects to the host programs that a guest asks for.
//!
//! A host program may want to know which guest, and which of its programs, has connected. So the socket is bound to a name
//! before it connects, which `getpeername` and `accept` then return. It is an abstract one (unix(7)): no file belongs to it, and
//! it goes with the socket.
//!
//! ```text
//! @vhost-user-vsock/2:80/4:40001/1234.17      port 40001 of CID 4 has connected to port 80 of CID 2;
//!                                             the rest, process and number, makes each name the only one of its kind
//! ```
//!
//! A guest may ask for nobody again and again. A socket is bound only once, so each attempt would take a new one. After a
//! refusal, the next attempt therefore asks first whether anybody has a socket at the path: with a datagram socket, whose
//! connect fails with EPROTOTYPE where there is a stream socket, and which nobody notices. It is used until the guest pauses.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};

use super::socket::{HostSocket, socket_type};
use crate::packet::header::{Cid, GuestPort, PacketType, PeerAddr, VsockHeader};
use crate::syscalls::{Argument, Syscall};

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// To connect, under a name, and to ask who is there. Landlock keeps `bind` from making files.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_socket, &unix_socket(libc::SOCK_STREAM)),
    Syscall::only(libc::SYS_socket, &unix_socket(libc::SOCK_SEQPACKET)),
    Syscall::only(libc::SYS_socket, &unix_socket(libc::SOCK_DGRAM)),
    Syscall::any(libc::SYS_bind),
    Syscall::any(libc::SYS_connect),
    Syscall::any(libc::SYS_close),
];

const fn unix_socket(kind: libc::c_int) -> [Argument; 2] {
    [
        Argument::Is(0, libc::AF_UNIX),
        Argument::Is(1, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC),
    ]
}

/// Who calls whom, as the host program may ask.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    from: (Cid, GuestPort),
    to: PeerAddr,
}

impl Call {
    /// The call that a guest's REQUEST is.
    pub fn of(request: &VsockHeader) -> Self {
        Self {
            from: (request.guest_cid, request.guest_port),
            to: request.peer,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cid, port) = self.from;
        write!(f, "vhost-user-vsock/{}/{cid}:{}", self.to, port.0)
    }
}

/// Connects to host programs.
#[derive(Debug, Default)]
pub struct Dialer {
    /// The last attempt was refused.
    refused: bool,
    /// The datagram socket that asks whether anybody is there.
    probe: Option<OwnedFd>,
}

impl Dialer {
    /// Connects to who listens at `path`, without waiting: a full backlog is `WouldBlock`. The host program sees the name of
    /// `call`, or no name where another socket has that name.
    pub fn connect(
        &mut self,
        path: &Path,
        packet_type: PacketType,
        call: Option<Call>,
    ) -> io::Result<HostSocket> {
        let address = UnixAddr::new(path)?;
        if self.refused {
            self.probe(&address)?;
        }
        let socket = socket(AddressFamily::Unix, socket_type(packet_type), FLAGS, None)?;
        if let Some(call) = call {
            // Anybody can have taken the name, and the guest must not suffer from it.
            let _ = unique_name(call).and_then(|name| bind(socket.as_raw_fd(), &name));
        }
        let connected = connect(socket.as_raw_fd(), &address);
        self.refused = connected.is_err();
        connected?;
        Ok(HostSocket::new(packet_type, socket))
    }

    /// Nobody will connect for a while.
    pub fn rest(&mut self) {
        self.probe = None;
    }

    /// Fails, as a connect would, where nobody has a socket at the address.
    fn probe(&mut self, address: &UnixAddr) -> io::Result<()> {
        let probe = match self.probe.take() {
            Some(probe) => probe,
            None => socket(AddressFamily::Unix, SockType::Datagram, FLAGS, None)?,
        };
        let answer = connect(self.probe.insert(probe).as_raw_fd(), address);
        match answer {
            Ok(()) | Err(Errno::EPROTOTYPE) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The name of a call. No other call of this process has it.
fn unique_name(call: Call) -> nix::Result<UnixAddr> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("{call}/{}.{number}", process::id());
    UnixAddr::new_abstract(name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use tempfile::TempDir;

    const CALL: Call = Call {
        from: (Cid::from_raw(4), GuestPort(40001)),
        to: PeerAddr::host(80),
    };

    fn peer_name(listener: &UnixListener) -> Option<String> {
        let (_, address) = listener.accept().unwrap();
        let name = address.as_abstract_name()?;
        Some(String::from_utf8(name.to_vec()).unwrap())
    }

    #[test]
    fn a_host_program_sees_who_calls() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut dialer = Dialer::default();
        let sockets = [(); 2].map(|()| {
            dialer
                .connect(&path, PacketType::Stream, Some(CALL))
                .unwrap()
        });
        let names = [(); 2].map(|()| peer_name(&listener).unwrap());
        let start = format!("vhost-user-vsock/2:80/4:40001/{}.", process::id());
        assert!(
            names.iter().all(|name| name.starts_with(&start)),
            "{names:?}"
        );
        assert_ne!(names[0], names[1]);
        drop(sockets);
        let _socket = dialer.connect(&path, PacketType::Stream, None).unwrap();
        assert_eq!(peer_name(&listener), None);
    }

    #[test]
    fn the_longest_name_fits() {
        let call = Call {
            from: (Cid::from_raw(u32::MAX.into()), GuestPort(u32::MAX)),
            to: PeerAddr {
                cid: Cid::from_raw(u32::MAX.into()),
                ..PeerAddr::host(u32::MAX)
            },
        };
        assert!(format!("{call}/{}.{}", u32::MAX, u64::MAX).len() < 108);
    }

    #[test]
    fn a_refusal_says_why_however_often() {
        let directory = TempDir::new().unwrap();
        let [missing, dead, file, datagrams] =
            ["missing", "dead", "file", "datagrams"].map(|name| directory.path().join(name));
        drop(UnixListener::bind(&dead).unwrap());
        std::fs::write(&file, "").unwrap();
        let _datagrams = UnixDatagram::bind(&datagrams).unwrap();
        for (path, error) in [
            (missing, libc::ENOENT),
            (dead, libc::ECONNREFUSED),
            (file, libc::ECONNREFUSED),
            (datagrams, libc::EPROTOTYPE),
        ] {
            let mut dialer = Dialer::default();
            for _ in 0..3 {
                let refused = dialer
                    .connect(&path, PacketType::Stream, Some(CALL))
                    .unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(error), "{}", path.display());
                dialer.rest();
            }
        }
    }

    #[test]
    fn somebody_who_comes_is_reached_after_refusals() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let mut dialer = Dialer::default();
        (0..2).for_each(|_| {
            drop(
                dialer
                    .connect(&path, PacketType::Stream, Some(CALL))
                    .unwrap_err(),
            )
        });
        let listener = UnixListener::bind(&path).unwrap();
        let _socket = dialer
            .connect(&path, PacketType::Stream, Some(CALL))
            .unwrap();
        assert!(peer_name(&listener).is_some());
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "the question was noticed");
    }
}

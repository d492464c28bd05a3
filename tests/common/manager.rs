//! A service manager as systemd is one to the daemon: notifications, socket activation, and the file descriptor store.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::cmsg_space;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

use super::daemon::{Daemon, PATIENCE, program};

/// The first descriptor that is passed (sd_listen_fds(3)).
const FIRST: usize = 3;

/// FileDescriptorStoreMax=.
const STORE_MAX: usize = 512;

/// The most descriptors that one message has.
const MAX_FDS: usize = 253;

/// One entry of the store.
struct Stored {
    name: String,
    fd: Arc<OwnedFd>,
    /// Whether it goes when its other end does.
    is_watched: bool,
}

#[derive(Default)]
struct State {
    store: Vec<Stored>,
    /// How many times READY was said.
    ready: u64,
    /// The number of the last of our own messages that was read.
    synced: u64,
    stop: bool,
    failure: Option<String>,
}

struct Shared {
    socket: UnixDatagram,
    path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

/// The service manager of one daemon and its successors.
pub struct Manager {
    directory: Arc<TempDir>,
    shared: Arc<Shared>,
    /// What is passed to each instance, by its name.
    sockets: Vec<(String, OwnedFd)>,
    /// How much it says that it keeps.
    store_max: usize,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    /// The manager of a daemon with its sockets in `directory`.
    pub fn new(directory: &Arc<TempDir>) -> Self {
        let path = directory.path().join("notify");
        let shared = Arc::new(Shared {
            socket: UnixDatagram::bind(&path).unwrap(),
            path,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let of_thread = shared.clone();
        Self {
            directory: directory.clone(),
            shared,
            sockets: Vec::new(),
            store_max: STORE_MAX,
            thread: Some(spawn(move || of_thread.serve())),
        }
    }

    /// Adds a socket that every instance gets.
    pub fn activate(&mut self, name: &str, socket: impl Into<OwnedFd>) {
        self.sockets.push((name.into(), socket.into()));
    }

    /// Keeps nothing.
    pub fn keep_nothing(&mut self) {
        self.store_max = 0;
    }

    /// Starts an instance, and waits until it is ready.
    #[track_caller]
    pub fn start(&self, options: &[String]) -> Daemon {
        let before = self.lock().ready;
        let daemon = self.spawn(options);
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.ready == before {
            drop(state);
            daemon.assert_alive();
            assert!(Instant::now() < deadline, "not ready\n{}", daemon.log());
            let guard = self.lock();
            let waited = self
                .shared
                .changed
                .wait_timeout(guard, Duration::from_millis(20));
            state = waited.expect("the manager's thread panicked").0;
        }
        drop(state);
        daemon
    }

    /// Starts an instance with the sockets and what is stored.
    pub fn spawn(&self, options: &[String]) -> Daemon {
        self.sync();
        let (mut names, mut fds) = (Vec::new(), Vec::new());
        for (name, fd) in &self.sockets {
            names.push(name.clone());
            fds.push(fd.try_clone().unwrap());
        }
        for stored in &self.lock().store {
            names.push(stored.name.clone());
            fds.push(stored.fd.try_clone().unwrap());
        }
        // Out of the way of the numbers that they get.
        let lowest = (FIRST + fds.len()).max(64) as i32;
        let moved = fds.iter().map(|fd| fcntl_dupfd_cloexec(fd, lowest));
        let fds: Vec<OwnedFd> = moved.collect::<Result<_, _>>().unwrap();
        let mut script = String::new();
        for (index, fd) in fds.iter().enumerate() {
            let (to, from) = (FIRST + index, fd.as_raw_fd());
            script += &format!("exec {to}<&{from} {from}<&-\n");
        }
        script += &match fds.len() {
            0 => "exec \"$@\"".to_owned(),
            count => format!("LISTEN_PID=$$ LISTEN_FDS={count} exec \"$@\""),
        };
        let program = program();
        // Not sh: that of Debian has only descriptors up to 9.
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]);
        command
            .arg(program.get_program())
            .args(program.get_args())
            .args(options)
            .env("NOTIFY_SOCKET", &self.shared.path)
            .env("FDSTORE", self.store_max.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if !fds.is_empty() {
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        let log = append_to_log(&self.directory);
        Daemon::spawn(&mut command, &self.directory, log, PATIENCE, &fds)
    }

    /// Stops an instance, which ends well and at once. What it had stored by then is in the store.
    #[track_caller]
    pub fn stop(&self, daemon: &Daemon) {
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0), "{}", daemon.log());
        self.sync();
    }

    /// Kills an instance.
    pub fn kill(&self, daemon: &Daemon) {
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit();
        self.sync();
    }

    /// Waits until all that was sent so far was read, and what has hung up is gone.
    #[track_caller]
    pub fn sync(&self) {
        let number = self.lock().synced + 1;
        let message = format!("X_SYNC={number}");
        let sender = UnixDatagram::unbound().unwrap();
        let sent = sender.send_to(message.as_bytes(), &self.shared.path);
        sent.unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.synced < number {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the manager is stuck");
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.expect("the manager's thread panicked").0;
        }
    }

    /// How many descriptors are stored under each name.
    #[track_caller]
    pub fn stored(&self) -> BTreeMap<String, usize> {
        self.sync();
        let mut names = BTreeMap::new();
        for stored in &self.lock().store {
            *names.entry(stored.name.clone()).or_default() += 1;
        }
        names
    }

    /// Whether what a daemon leaves for its successor at a stop is stored.
    #[track_caller]
    pub fn has_parcels(&self) -> bool {
        self.stored().keys().any(|name| is_parcel(name))
    }

    /// Stores something, as an instance would.
    pub fn put(&self, name: &str, fd: impl Into<OwnedFd>) {
        let fd = Arc::new(fd.into());
        self.lock().store.push(Stored {
            name: name.into(),
            fd,
            is_watched: false,
        });
    }

    /// Takes out what is stored under a name.
    pub fn take(&self, name: &str) -> Vec<Arc<OwnedFd>> {
        let mut state = self.lock();
        let (taken, kept): (Vec<_>, _) = std::mem::take(&mut state.store)
            .into_iter()
            .partition(|stored| stored.name == name);
        state.store = kept;
        taken.into_iter().map(|stored| stored.fd).collect()
    }

    #[track_caller]
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.shared.state.lock();
        let state = state.expect("the manager's thread panicked");
        assert!(state.failure.is_none(), "{:?}", state.failure);
        state
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Ok(mut state) = self.shared.state.lock() {
            state.stop = true;
        }
        // Wakes the thread, which reads no more: where there is no room, it has been woken.
        if let Ok(sender) = UnixDatagram::unbound()
            && sender.set_nonblocking(true).is_ok()
        {
            let _ = sender.send_to(b"X_SYNC=0", &self.shared.path);
        }
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Whether a name is one under which a stopping daemon stores all that it has: `handover-<n>`.
pub fn is_parcel(name: &str) -> bool {
    let number = name.strip_prefix("handover-");
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The log that an instance and those before it write.
pub fn append_to_log(directory: &TempDir) -> fs::File {
    let path = directory.path().join("log");
    let mut options = OpenOptions::new();
    options.create(true).append(true).open(path).unwrap()
}

impl Shared {
    /// The thread: reads messages, and drops what has hung up.
    fn serve(&self) {
        loop {
            let watched = {
                let state = self.state.lock().unwrap();
                if state.stop {
                    return;
                }
                let watched = state.store.iter().filter(|stored| stored.is_watched);
                watched.map(|stored| stored.fd.clone()).collect::<Vec<_>>()
            };
            let mut polled = vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let hang_ups = watched
                .iter()
                .map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty()));
            polled.extend(hang_ups);
            poll(&mut polled, PollTimeout::NONE).unwrap();
            let has_message = polled[0].any().unwrap();
            let gone = watched.iter().zip(&polled[1..]);
            let gone = gone.filter(|(_, polled)| polled.any().unwrap());
            let gone: Vec<_> = gone.map(|(fd, _)| fd.clone()).collect();
            let mut state = self.state.lock().unwrap();
            let is_gone = |fd: &Arc<OwnedFd>| gone.iter().any(|gone| Arc::ptr_eq(gone, fd));
            state.store.retain(|stored| !is_gone(&stored.fd));
            if has_message {
                let (text, fds) = receive(&self.socket);
                state.take(&text, fds);
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// A message and the descriptors that came with it.
fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut bytes = vec![0; 1 << 16];
    let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut buffers, &mut control, flags).unwrap();
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    bytes.truncate(received.bytes);
    (String::from_utf8(bytes).unwrap(), fds)
}

impl State {
    fn take(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let value = |key: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        if let Some(number) = value("X_SYNC") {
            self.synced = self.synced.max(number.parse().unwrap());
        }
        if value("READY") == Some("1") {
            self.ready += 1;
        }
        let name = value("FDNAME").unwrap_or("stored");
        if name.len() > 255 || name.contains(|c: char| c == ':' || !(' '..='~').contains(&c)) {
            self.failure = Some(format!("no name of a descriptor: {text:?}"));
        }
        if value("FDSTOREREMOVE") == Some("1") {
            self.store.retain(|stored| stored.name != name);
        } else if value("FDSTORE") == Some("1") {
            if fds.is_empty() {
                self.failure = Some(format!("nothing to store: {text:?}"));
            }
            for fd in fds {
                self.store(name, fd, value("FDPOLL") != Some("0"));
            }
        }
    }

    /// What is stored already is not stored again, under whatever name.
    fn store(&mut self, name: &str, fd: OwnedFd, is_watched: bool) {
        let identity = identity(&fd);
        let mut all = self.store.iter();
        if all.any(|stored| self::identity(&stored.fd) == identity) {
            return;
        }
        if self.store.len() == STORE_MAX {
            self.failure = Some(format!("no room for {name}"));
            return;
        }
        self.store.push(Stored {
            name: name.into(),
            fd: Arc::new(fd),
            is_watched,
        });
    }
}

/// What tells one open file from others: device, inode and, since all eventfds have one in common, the eventfd's number.
fn identity(fd: &OwnedFd) -> (u64, u64, Option<String>) {
    let name = |directory: &str| format!("/proc/self/{directory}/{}", fd.as_raw_fd());
    let metadata = fs::metadata(name("fd")).unwrap();
    let info = fs::read_to_string(name("fdinfo")).unwrap();
    let event = info.lines().find(|line| line.starts_with("eventfd-id"));
    (metadata.dev(), metadata.ino(), event.map(str::to_owned))
}

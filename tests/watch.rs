//! `stats --watch` on a terminal: it fits, shows what moves first, and follows the terminal's size.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use common::daemon::{Daemon, PATIENCE, binary};
use common::sim::host::from_guest;
use common::sim::{Flow, Setup, SimGuest};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::termios::tcsetwinsize;
use tempfile::TempDir;

/// What begins a page.
const HOME: &str = "\x1b[H";

/// A daemon with a stats socket, and a guest.
struct Monitored {
    daemon: Daemon,
    path: PathBuf,
    _folder: TempDir,
}

impl Monitored {
    fn start() -> Self {
        let folder = TempDir::with_prefix("vsock-test-").unwrap();
        let path = folder.path().join("stats");
        let daemon = Daemon::start_with(&[&format!("--stats-path={}", path.display())]);
        Self {
            daemon,
            path,
            _folder: folder,
        }
    }
}

/// Opens so many connections from the guest, to the host's port 7 each.
fn open(daemon: &Daemon, guest: &mut SimGuest, count: u32) -> Vec<(Flow, UnixStream)> {
    let flows = (0..count).map(|index| Flow::new(5001 + index, 7));
    let opened = flows.map(|flow| {
        let stream = from_guest(daemon, guest, &flow);
        std::fs::remove_file(daemon.host_port_path(7)).unwrap();
        (flow, stream)
    });
    opened.collect()
}

/// A terminal on which `stats --watch` runs.
struct Watched {
    program: Child,
    terminal: OwnedFd,
    output: Receiver<String>,
    /// The page that has not ended yet.
    rest: String,
}

impl Watched {
    fn start(path: &Path, watch: &str, columns: u16, rows: u16) -> Self {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let program = Command::new(binary())
            .args(["stats", watch])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(pty.slave)
            .spawn()
            .unwrap();
        let mut reader = File::from(pty.master.try_clone().unwrap());
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(count) = reader.read(&mut part) {
                let part = String::from_utf8_lossy(&part[..count]).into_owned();
                if sender.send(part).is_err() {
                    break;
                }
            }
        });
        Self {
            program,
            terminal: pty.master,
            output,
            rest: String::new(),
        }
    }

    /// The next page, complete, without escapes.
    fn page(&mut self) -> Vec<String> {
        let end = "\x1b[J";
        loop {
            if let Some(at) = self.rest.find(end) {
                let rest = self.rest.split_off(at);
                let page = std::mem::replace(&mut self.rest, rest[end.len()..].to_owned());
                let (_, page) = page.rsplit_once(HOME).unwrap();
                let page = page.replace("\x1b[?7l", "").replace("\x1b[K", "");
                assert!(!page.contains('\x1b'), "{page:?}");
                return page
                    .split("\r\n")
                    .map(|line| line.replace('\r', ""))
                    .collect();
            }
            let part = self.output.recv_timeout(PATIENCE);
            self.rest += &part.unwrap_or_else(|_| panic!("no page but {:?}", self.rest));
        }
    }

    fn resize(&self, columns: u16, rows: u16) {
        let mut size = rustix::termios::tcgetwinsize(self.terminal.as_fd()).unwrap();
        (size.ws_col, size.ws_row) = (columns, rows);
        tcsetwinsize(self.terminal.as_fd(), size).unwrap();
        // It is not the program's controlling terminal, so the kernel does not.
        kill(Pid::from_raw(self.program.id() as i32), Signal::SIGWINCH).unwrap();
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[track_caller]
fn assert_fits(page: &[String], columns: usize, rows: usize) {
    assert!(page.len() <= rows, "{} lines: {page:#?}", page.len());
    for line in page {
        assert!(line.chars().count() <= columns, "{line:?}");
    }
}

/// How many connections a page lists, and how many it says there are in all.
fn connections(page: &[String]) -> (usize, usize) {
    let listed = page.iter().filter(|line| {
        let first = line.split_whitespace().next();
        first.is_some_and(|word| word.parse::<u32>().is_ok_and(|port| port > 5000))
    });
    let listed = listed.count();
    let more = page.last().and_then(|line| line.strip_prefix("and "));
    let more = more.and_then(|line| line.strip_suffix(" more"));
    (
        listed,
        listed + more.map_or(0, |more| more.parse().unwrap()),
    )
}

#[test]
fn a_page_fits_the_terminal_and_follows_its_size() {
    let monitored = Monitored::start();
    let mut guest = SimGuest::start(&monitored.daemon, Setup::default());
    let _streams = open(&monitored.daemon, &mut guest, 40);
    // All but the first page come because of the terminal.
    let mut watched = Watched::start(&monitored.path, "--watch=3600", 80, 24);
    let page = watched.page();
    assert_fits(&page, 80, 24);
    assert_eq!(page.len(), 24, "{page:#?}");
    let (listed, all) = connections(&page);
    assert!(listed > 15 && all == 40, "{page:#?}");
    for (columns, rows) in [(30, 10), (200, 100), (12, 3), (1, 1)] {
        watched.resize(columns.try_into().unwrap(), rows.try_into().unwrap());
        let page = watched.page();
        assert_fits(&page, columns, rows);
        if rows == 100 {
            assert_eq!(connections(&page), (40, 40), "{page:#?}");
            let heading = page
                .iter()
                .find(|line| line.contains("GUEST PORT"))
                .unwrap();
            for column in ["FROM GUEST/s", "TO GUEST/s", "AGE", "WAITS FOR", "CREDIT"] {
                assert!(heading.contains(column), "{heading}");
            }
        }
    }
}

#[test]
fn what_moves_comes_first() {
    let monitored = Monitored::start();
    let mut guest = SimGuest::start(&monitored.daemon, Setup::default());
    let mut streams = open(&monitored.daemon, &mut guest, 30);
    let mut watched = Watched::start(&monitored.path, "--watch=1", 100, 20);
    let page = watched.page();
    assert!(
        page[0].contains("a VMM is connected; 30 connections"),
        "{page:#?}"
    );
    // The last of those that are in no order yet.
    let (flow, stream) = &mut streams[29];
    let is_first = |page: &[String]| {
        let heading = page.iter().position(|line| line.contains("GUEST PORT"));
        let row = &page[heading.unwrap() + 1];
        let cells: Vec<&str> = row.split_whitespace().collect();
        // PORT PORT 0 B RATE UNIT ...
        cells[0] == flow.guest_port.to_string() && cells[2] == "0" && cells[4] != "0"
    };
    for _ in 0..20 {
        stream.write_all(&[1; 1000]).unwrap();
        guest.recv().assert_is(common::sim::Op::Rw, flow);
        let page = watched.page();
        assert_fits(&page, 100, 20);
        if is_first(&page) {
            assert!(page[0].contains("0 B/s from the guest"), "{page:#?}");
            return;
        }
    }
    panic!("never first: {:#?}", watched.page());
}

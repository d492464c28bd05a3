//! `--watch`: the statistics again and again. On a terminal they take its size and follow it; anywhere else they are text.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGWINCH;

use super::screen::{Moment, Size, screen};
use super::{Format, StatsArgs, StatsError, ask, print};

/// Clears the terminal.
const CLEAR: &str = "\x1b[2J";
/// Moves the cursor home, and cuts lines at the edge of the terminal instead of wrapping them.
const BEGIN_SCREEN: &str = "\x1b[H\x1b[?7l";
/// Ends a line, and clears what was behind it.
const END_LINE: &str = "\x1b[K\n";
/// Clears what is below, and wraps lines again.
const END_SCREEN: &str = "\x1b[K\x1b[J\x1b[?7h";

/// A terminal that does not know its size.
const DEFAULT_SIZE: Size = Size {
    columns: 80,
    rows: 24,
};

/// Shows the statistics every so many seconds, until nobody reads them.
///
/// # Errors
/// As for the statistics themselves.
pub(super) fn run(args: &StatsArgs, seconds: u32) -> Result<(), StatsError> {
    let interval = Duration::from_secs(seconds.max(1).into());
    let resized = Resized::watch().map_err(StatsError::Output)?;
    let mut before = None;
    let mut clear = CLEAR;
    loop {
        let answers = ask(args)?;
        let next = Instant::now() + interval;
        if args.format != Format::Table {
            let text = answers.text(args).map_err(StatsError::Output)?;
            if !print(&text).map_err(StatsError::Output)? {
                return Ok(());
            }
            resized.wait(next).map_err(StatsError::Output)?;
            continue;
        }
        let now = Moment::new(answers);
        loop {
            let text = match size() {
                Some(size) => on_terminal(&screen(&now, before.as_ref(), Some(size)), clear),
                None => screen(&now, before.as_ref(), None).join("\n") + "\n\n",
            };
            if !print(&text).map_err(StatsError::Output)? {
                return Ok(());
            }
            if !resized.wait(next).map_err(StatsError::Output)? {
                break;
            }
            clear = CLEAR;
        }
        clear = "";
        before = Some(now);
    }
}

fn on_terminal(lines: &[String], clear: &str) -> String {
    format!("{clear}{BEGIN_SCREEN}{}{END_SCREEN}", lines.join(END_LINE))
}

/// The size of the terminal, if standard output is one.
fn size() -> Option<Size> {
    let output = io::stdout();
    if !output.is_terminal() {
        return None;
    }
    let size = tcgetwinsize(&output).ok();
    let size = size.filter(|size| size.ws_col > 0 && size.ws_row > 0);
    Some(size.map_or(DEFAULT_SIZE, |size| Size {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    }))
}

/// Hears of the terminal's changes of size.
struct Resized(UnixStream);

impl Resized {
    fn watch() -> io::Result<Self> {
        let (resized, signal) = UnixStream::pair()?;
        resized.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGWINCH, signal)?;
        Ok(Self(resized))
    }

    /// Waits until `deadline`. True if the size has changed before.
    fn wait(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let milliseconds = left.as_micros().div_ceil(1000);
            let timeout = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if Instant::now() >= deadline => return Ok(false),
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => {
                    // One byte for each signal; several changes are one.
                    while matches!((&self.0).read(&mut [0; 64]), Ok(count) if count > 0) {}
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

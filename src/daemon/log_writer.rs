//! The log's way to stderr.
//!
//! Who reads stderr may be slow, or stop to read at all, and then a write to it waits. It must not be the worker that
//! waits, so a thread of its own writes, and lines wait for it in a queue with a limit. Stderr itself stays as it is: it
//! may be shared with other programs, which a flag against waiting would surprise.

use std::collections::VecDeque;
use std::env;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use env_logger::{Target, WriteStyle};
use log::{Level, LevelFilter};
use parking_lot::{Condvar, Mutex};

use crate::syscalls::Syscall;

/// The system calls of the thread that writes.
pub(crate) fn syscalls() -> Vec<Syscall> {
    vec![Syscall::any(libc::SYS_write), Syscall::any(libc::SYS_futex)]
}

/// How many lines wait to be written. One more is dropped, and counted.
pub const MAX_LINES: usize = 1024;

/// Where the log's lines go, one with each `write`. That never waits and never fails. All clones are one queue.
#[derive(Clone, Default)]
pub struct LogWriter(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is a line to write.
    filled: Condvar,
    /// All lines have been written.
    drained: Condvar,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    /// Lines that were dropped and not told of.
    lost: u64,
    writing: bool,
}

impl LogWriter {
    /// Makes this the way of the process's log, at the level of so many `-v`, unless RUST_LOG says otherwise. A terminal
    /// gets colours, the journal the priority of each line (sd-daemon(3)) and no time, since it has its own.
    pub fn install(verbose: u8) -> Self {
        let level = match verbose {
            0 => LevelFilter::Info,
            1 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        let in_colour =
            io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        let style = if in_colour {
            WriteStyle::Always
        } else {
            WriteStyle::Never
        };
        let log = Self::default();
        let mut builder = env_logger::Builder::new();
        if is_journal(io::stderr()) {
            builder.format(|line, record| {
                let priority = match record.level() {
                    Level::Error => 3,
                    Level::Warn => 4,
                    Level::Info => 6,
                    Level::Debug | Level::Trace => 7,
                };
                writeln!(line, "<{priority}>{}: {}", record.target(), record.args())
            });
        }
        builder
            .filter_level(level)
            .write_style(style)
            .parse_default_env()
            .target(Target::Pipe(Box::new(log.clone())))
            .init();
        log
    }

    /// Starts the thread that writes to `out`. The lines so far have waited for it.
    pub fn start(&self, mut out: impl Write + Send + 'static) -> io::Result<()> {
        let shared = self.0.clone();
        thread::Builder::new()
            .name("log".into())
            .spawn(move || shared.write_to(&mut out))?;
        Ok(())
    }

    /// Waits until all lines have been written, or the time is over.
    pub fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut queue = self.0.queue.lock();
        while queue.writing || !queue.lines.is_empty() {
            if self.0.drained.wait_until(&mut queue, deadline).timed_out() {
                return;
            }
        }
    }
}

/// Whether this is the socket that the journal has given us, by the device and file that JOURNAL_STREAM names.
pub fn is_journal(stream: impl AsFd) -> bool {
    let file = stream.as_fd().try_clone_to_owned().map(File::from);
    let metadata = file.and_then(|file| file.metadata());
    let given = metadata.map(|data| format!("{}:{}", data.dev(), data.ino()));
    given.is_ok_and(|given| env::var("JOURNAL_STREAM").is_ok_and(|journal| journal == given))
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue.lock();
        if queue.lines.len() < MAX_LINES {
            queue.lines.push_back(line.to_vec());
            self.0.filled.notify_one();
        } else {
            queue.lost += 1;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn write_to(&self, out: &mut impl Write) {
        let mut queue = self.queue.lock();
        loop {
            let Some(mut line) = queue.lines.pop_front() else {
                self.drained.notify_all();
                self.filled.wait(&mut queue);
                continue;
            };
            if queue.lines.is_empty() && queue.lost > 0 {
                let lost = std::mem::take(&mut queue.lost);
                line.extend(format!("{lost} lines of the log were lost\n").bytes());
            }
            queue.writing = true;
            drop(queue);
            // A stderr that is closed or on a full disk leaves nobody to tell.
            let _ = out.write_all(&line).and_then(|()| out.flush());
            queue = self.queue.lock();
            queue.writing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn lines_are_written_in_their_order() {
        let (reader, writer) = io::pipe().unwrap();
        let mut log = LogWriter::default();
        (0..100).for_each(|number| writeln!(log, "line {number}").unwrap());
        log.start(writer).unwrap();
        log.drain(PATIENCE);
        let lines = BufReader::new(reader).lines().take(100);
        for (number, line) in lines.enumerate() {
            assert_eq!(line.unwrap(), format!("line {number}"));
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_stops_nobody() {
        let (reader, writer) = io::pipe().unwrap();
        let mut log = LogWriter::default();
        log.start(writer).unwrap();
        let line = [b'x'; 999];
        // More than the pipe and the queue hold.
        (0..10_000).for_each(|_| log.write_all(&[&line[..], b"\n"].concat()).unwrap());
        log.drain(Duration::from_millis(1));
        assert!(log.0.queue.lock().lines.len() <= MAX_LINES);

        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let mut written = 0;
        let lost = loop {
            match lines.next().unwrap() {
                text if text.len() == 999 => written += 1,
                text => break text,
            }
        };
        assert_eq!(
            lost,
            format!("{} lines of the log were lost", 10_000 - written)
        );
        log.write_all(b"goes on\n").unwrap();
        assert_eq!(lines.next().unwrap(), "goes on");
    }
}

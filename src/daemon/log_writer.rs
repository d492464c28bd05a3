//! The log, and its way to stderr.
//!
//! Whoever reads stderr may be slow or stop reading, and then a write to it blocks. That must not block the worker, so a
//! thread of its own writes the lines, which wait in a queue of bounded length. Stderr itself is not made non-blocking:
//! other programs may share it.

use std::collections::VecDeque;
use std::env;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use env_logger::{
    Builder, DEFAULT_FILTER_ENV, DEFAULT_WRITE_STYLE_ENV, Logger, Target, WriteStyle,
};
use log::{Level, LevelFilter, Log, Metadata, Record, warn};
use parking_lot::{Condvar, Mutex};

use crate::log_vm;
use crate::syscalls::Syscall;

/// The system calls of the thread that writes.
pub(crate) fn syscalls() -> Vec<Syscall> {
    vec![Syscall::any(libc::SYS_write), Syscall::any(libc::SYS_futex)]
}

/// How many lines wait to be written. Further ones are dropped and counted.
pub const MAX_LINES: usize = 1024;

/// The library that walks the rings. It logs an error for each ring that a guest has broken, without a limit; the worker
/// logs the same at most once a second.
const UNLIMITED_TARGET: &str = "virtio_queue";

/// A writer for the log, one line with each `write`. It never blocks and never fails. All clones share a queue.
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
    /// How many lines were dropped since that was last written.
    dropped: u64,
    writing: bool,
}

impl LogWriter {
    /// Installs the logger of the process, which writes here. Its level follows from the number of `-v`, or from RUST_LOG.
    /// A terminal gets colours; the journal gets priorities (sd-daemon(3)) and no timestamps, since it has its own.
    pub fn install(verbose: u8) -> Self {
        let level = match verbose {
            0 => LevelFilter::Info,
            1 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        let log = Self::default();
        let mut builder = Builder::new();
        builder
            .filter_level(level)
            .filter_module(UNLIMITED_TARGET, LevelFilter::Off)
            .write_style(write_style())
            .target(Target::Pipe(Box::new(log.clone())));
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
        if let Ok(style) = env::var(DEFAULT_WRITE_STYLE_ENV) {
            builder.parse_write_style(&style);
        }
        let filter = filter_from_env();
        if let Ok(Some(filter)) = &filter {
            builder.parse_filters(filter);
        }
        let logger = builder.build();
        log::set_max_level(logger.filter());
        // One that is installed already is a program's that embeds this.
        let _ = log::set_boxed_logger(Box::new(DaemonLogger {
            logger,
            begun: Once::new(),
        }));
        if let Err(mistake) = filter {
            warn!("{DEFAULT_FILTER_ENV} is ignored: {mistake}");
        }
        log
    }

    /// Starts the thread that writes to `out`, beginning with the lines that are in the queue.
    ///
    /// # Errors
    /// There is no memory for a thread, or a limit is reached.
    pub fn start(&self, mut out: impl Write + Send + 'static) -> io::Result<()> {
        let shared = self.0.clone();
        thread::Builder::new()
            .name("log".into())
            .spawn(move || shared.write_to(&mut out))?;
        Ok(())
    }

    /// Waits until all lines have been written, but not longer than `timeout`.
    pub fn drain(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut queue = self.0.queue.lock();
        while queue.writing || !queue.lines.is_empty() {
            if self.0.drained.wait_until(&mut queue, deadline).timed_out() {
                return;
            }
        }
    }
}

/// Puts the CID of the thread's VM before each line, and a line with the version before the first.
struct DaemonLogger {
    logger: Logger,
    begun: Once,
}

impl Log for DaemonLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.begun.call_once(|| {
            let version = env!("CARGO_PKG_VERSION");
            let mut first = Record::builder();
            first.level(Level::Info).target(env!("CARGO_CRATE_NAME"));
            let args = format_args!("vhost-user-vsock {version}");
            self.logger.log(&first.args(args).build());
        });
        match log_vm::current() {
            Some(cid) => {
                let metadata = record.metadata().clone();
                let mut named = Record::builder();
                let args = format!("CID {cid}: {}", record.args());
                named.metadata(metadata);
                self.logger.log(&named.args(format_args!("{args}")).build());
            }
            None => self.logger.log(record),
        }
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

/// Colours are for terminals (no-color.org).
fn write_style() -> WriteStyle {
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if io::stderr().is_terminal() && !no_color {
        WriteStyle::Always
    } else {
        WriteStyle::Never
    }
}

/// The filter in RUST_LOG, or what is wrong with it. It is checked here because `env_logger` prints mistakes to stderr, and
/// panics if it can't.
fn filter_from_env() -> Result<Option<String>, String> {
    let Some(filter) = env::var_os(DEFAULT_FILTER_ENV) else {
        return Ok(None);
    };
    let filter = filter.into_string().map_err(|_| "it is not UTF-8")?;
    match env_filter::Builder::new().try_parse(&filter) {
        Ok(_) => Ok(Some(filter)),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether this is the stream that the journal reads, by the device and inode in JOURNAL_STREAM (systemd.exec(5)).
pub fn is_journal(stream: impl AsFd) -> bool {
    let file = stream.as_fd().try_clone_to_owned().map(File::from);
    let metadata = file.and_then(|file| file.metadata());
    let identity = metadata.map(|data| format!("{}:{}", data.dev(), data.ino()));
    identity
        .is_ok_and(|identity| env::var("JOURNAL_STREAM").is_ok_and(|journal| journal == identity))
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue.lock();
        if queue.lines.len() < MAX_LINES {
            queue.lines.push_back(line.to_vec());
            self.0.filled.notify_one();
        } else {
            queue.dropped += 1;
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
            if queue.lines.is_empty() && queue.dropped > 0 {
                let dropped = std::mem::take(&mut queue.dropped);
                line.extend(format!("{dropped} lines of the log were lost\n").bytes());
            }
            queue.writing = true;
            drop(queue);
            // There is nowhere to report an error to.
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

    /// It bounds a failing run; no test passes by it.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn lines_are_written_in_order() {
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
    fn a_pipe_that_nobody_reads_blocks_nobody() {
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

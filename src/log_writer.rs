//! The log's way to stderr.
//!
//! Who reads stderr may be slow, or stop to read at all, and then a write to it waits. It must not be the worker that
//! waits, so a thread of its own writes, and lines wait for it in a queue with a limit. Stderr itself stays as it is: it
//! may be shared with other programs, which a flag against waiting would surprise.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

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
    /// Lines that were dropped since one was written.
    lost: u64,
    writing: bool,
}

impl LogWriter {
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

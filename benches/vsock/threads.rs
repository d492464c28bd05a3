//! The threads of one run. A thread that fails or panics ends the run for all of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::shared::Shared;

/// How long a thread may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A thread of a run; it returns nothing when it failed.
pub type Running<T> = JoinHandle<Option<T>>;

/// Starts a thread.
pub fn spawn<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<T, String> + Send + 'static,
) -> Running<T> {
    let shared = shared.clone();
    thread::spawn(move || {
        catch_panics(|| work(&shared))
            .inspect_err(|failure| shared.fail(failure))
            .ok()
    })
}

/// Waits for a thread, which must have been given a reason to end.
pub fn join<T>(thread: Running<T>) -> Result<Option<T>, String> {
    let begin = Instant::now();
    while !thread.is_finished() {
        if begin.elapsed() > END_TIMEOUT {
            return Err("a thread does not end".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    thread.join().map_err(|_| "a thread panicked".into())
}

/// Waits for threads without a result.
pub fn join_all(threads: Vec<Running<()>>) -> Result<(), String> {
    threads
        .into_iter()
        .try_for_each(|thread| join(thread).map(drop))
}

/// Turns a panic into an error: the frontend panics when a daemon does not answer.
pub fn catch_panics<T, E: From<String>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("panicked").to_string().into())
    })
}

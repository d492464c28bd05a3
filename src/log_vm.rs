//! Which VM a thread works for, so that each line of the log can name it where a process serves several.

use std::cell::Cell;

use crate::packet::header::Cid;

thread_local! {
    static VM: Cell<Option<Cid>> = const { Cell::new(None) };
}

/// From now on, lines that this thread logs are about this VM.
pub fn set(cid: Cid) {
    VM.set(Some(cid));
}

/// The VM that lines of this thread are about, if the log is to name it.
pub fn current() -> Option<Cid> {
    // A thread that is ending may still log.
    VM.try_with(Cell::get).ok().flatten()
}

/// Work for another thread, whose lines are about the VM that this thread works for.
pub fn inherit(work: impl FnOnce() + Send + 'static) -> impl FnOnce() + Send + 'static {
    let vm = current();
    move || {
        VM.set(vm);
        work();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_thread_inherits_the_vm_where_it_is_asked_to() {
        let cid = Cid::from_raw(4);
        thread::spawn(move || {
            assert_eq!(current(), None);
            set(cid);
            let inherited = thread::spawn(inherit(move || assert_eq!(current(), Some(cid))));
            inherited.join().unwrap();
            let other = thread::spawn(|| assert_eq!(current(), None));
            other.join().unwrap();
        })
        .join()
        .unwrap();
    }
}

use super::*;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::thread;

use crate::config::SocketAccess;
use crate::host::listener::SocketFile;
use crate::packet::header::PacketType;
use nix::unistd::geteuid;
use tempfile::TempDir;

/// A predecessor's socket, in a directory of its own.
struct Place {
    directory: TempDir,
    socket: SocketFile,
    /// Never readable.
    stop: UnixStream,
    _stopper: UnixStream,
}

impl Place {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("handover");
        let access = SocketAccess::default();
        let socket = SocketFile::bind(&path, PacketType::Seqpacket, access).unwrap();
        let (stop, stopper) = UnixStream::pair().unwrap();
        Self {
            directory,
            socket,
            stop,
            _stopper: stopper,
        }
    }

    fn connect(&self) -> Predecessor {
        let connected = Predecessor::connect(&self.directory.path().join("handover"));
        connected.unwrap().unwrap()
    }

    fn accept(&self) -> Successor<'_> {
        let accepted = Successor::accept(self.socket.as_fd(), geteuid(), self.stop.as_fd());
        accepted.unwrap().unwrap()
    }

    /// What becomes of a hand-over to a successor that has connected.
    fn hand_over(&self) -> Result<usize, PathError> {
        let successor = self.accept();
        successor.await_request()?;
        let state: File = tempfile::tempfile().unwrap();
        let fds = vec![self.stop.as_fd(); 500];
        successor.give(parcels::pack(&state, &fds))
    }
}

fn send(successor: &Predecessor, text: &[u8]) {
    successor.channel.send_text(text, &[]).unwrap();
}

const TAKE_OVER: &[u8] = br#"{"take_over":{"version":1}}"#;

#[test]
fn nobody_at_the_path_is_no_predecessor() {
    let place = Place::new();
    let path = place.directory.path().join("handover");
    place.socket.leave();
    // The file is a dead one now.
    assert!(path.exists() && Predecessor::connect(&path).unwrap().is_none());
    std::fs::remove_file(&path).unwrap();
    assert!(Predecessor::connect(&path).unwrap().is_none());
}

#[test]
fn a_successor_gets_everything_and_then_serves() {
    let place = Place::new();
    thread::scope(|scope| {
        let successor = place.connect();
        let given = scope.spawn(|| place.hand_over());
        let (_, fds) = successor.take(VERSION).unwrap().finish().unwrap();
        assert_eq!(fds.iter().flatten().count(), 500);
        successor.relieve().unwrap();
        assert_eq!(given.join().unwrap().unwrap(), 0);
    });
}

#[test]
fn messages_are_as_they_are_documented() {
    for (message, text) in [
        (Message::TakeOver { version: 1 }, TAKE_OVER),
        (Message::Refused("why".into()), br#"{"refused":"why"}"#),
        (Message::Ready(true), br#"{"ready":true}"#),
        (Message::Go(true), br#"{"go":true}"#),
    ] {
        assert_eq!(serde_json::to_vec(&message).unwrap(), text);
    }
    // A later version may say more.
    let later = br#"{"take_over":{"version":3,"name":"x"}}"#;
    let message: Message = serde_json::from_slice(later).unwrap();
    assert_eq!(message, Message::TakeOver { version: 3 });
}

#[test]
fn a_successor_that_leaves_at_any_time_changes_nothing() {
    let place = Place::new();
    let leave_after = |messages: &[&[u8]]| {
        let successor = place.connect();
        messages.iter().for_each(|text| send(&successor, text));
        drop(successor);
        place.hand_over().unwrap_err()
    };
    assert!(matches!(leave_after(&[]), PathError::Closed));
    assert!(matches!(leave_after(&[TAKE_OVER]), PathError::Closed));
    // It said that it was ready, and is gone before it could be told to go on.
    let ready = leave_after(&[TAKE_OVER, br#"{"ready":true}"#]);
    assert!(matches!(ready, PathError::Closed));
}

#[test]
fn a_successor_that_dies_with_the_parcels_changes_nothing() {
    let place = Place::new();
    thread::scope(|scope| {
        let successor = place.connect();
        let given = scope.spawn(|| place.hand_over());
        successor.take(VERSION).unwrap();
        drop(successor);
        let given = given.join().unwrap();
        assert!(matches!(given, Err(PathError::Closed)), "{given:?}");
    });
}

#[test]
fn garbage_and_messages_at_the_wrong_time_change_nothing() {
    let place = Place::new();
    let after = |messages: &[&[u8]]| {
        let successor = place.connect();
        messages.iter().for_each(|text| send(&successor, text));
        let given = place.hand_over();
        drop(successor);
        given.unwrap_err()
    };
    for garbage in [
        &b"garbage"[..],
        b"{}",
        b"\0",
        br#"{"take_over":{}}"#,
        br#"{"ready":true}"#,
        br#"{"go":true}"#,
        br#"{"parcel":0,"of":1}"#,
    ] {
        assert!(matches!(after(&[garbage]), PathError::Garbage));
        // That it is ready may be said early.
        if garbage != br#"{"ready":true}"# {
            let later = after(&[TAKE_OVER, garbage]);
            assert!(matches!(later, PathError::Garbage), "{later}");
        }
    }
    let long = [b' '; MAX_TEXT + 1];
    assert!(matches!(after(&[&long]), PathError::Io(_)));
    let refused = after(&[TAKE_OVER, br#"{"refused":"no memory"}"#]);
    assert_eq!(refused.to_string(), "no memory");
}

#[test]
fn a_successor_that_reads_no_such_version_is_told() {
    let place = Place::new();
    let successor = place.connect();
    send(&successor, br#"{"take_over":{"version":0}}"#);
    let accepted = place.accept();
    let error = accepted.await_request().unwrap_err();
    accepted.refuse(&error.to_string());
    let error = successor.take(VERSION).unwrap_err().to_string();
    let message = "the state of the daemon that runs has version 1, this one reads version 0";
    assert_eq!(error, message);
}

#[test]
fn a_successor_is_told_why_in_as_many_words_as_fit() {
    let place = Place::new();
    let successor = place.connect();
    place.accept().refuse(&"ä".repeat(MAX_TEXT));
    let reason = successor.take(VERSION).unwrap_err().to_string();
    assert_eq!(reason, "ä".repeat(MAX_REASON / 2));
}

#[test]
fn a_second_successor_waits_for_its_turn() {
    let place = Place::new();
    thread::scope(|scope| {
        let first = place.connect();
        let second = place.connect();
        let given = scope.spawn(|| (place.hand_over(), place.hand_over()));
        let taken = scope.spawn(move || {
            second.take(VERSION)?;
            second.relieve()
        });
        first.take(VERSION).unwrap();
        first.refuse("changed my mind");
        taken.join().unwrap().unwrap();
        let (first, second) = given.join().unwrap();
        assert!(matches!(first, Err(PathError::Refused(_))));
        second.unwrap();
    });
}

#[test]
fn a_stop_ends_the_wait_for_a_successor() {
    let mut place = Place::new();
    let (stop, _) = UnixStream::pair().unwrap();
    place.stop = stop;
    let _successor = place.connect();
    let given = place.hand_over();
    assert!(matches!(given, Err(PathError::Stopped)));
}

#[test]
fn a_predecessor_that_ends_or_sends_garbage_is_left() {
    let place = Place::new();
    let successor = place.connect();
    drop(place.accept());
    let taken = successor.take(VERSION);
    assert!(matches!(taken, Err(PathError::Closed)), "{taken:?}");
    for text in [&b"garbage"[..], br#"{"go":true}"#, b"[1]"] {
        let successor = place.connect();
        let accepted = place.accept();
        accepted.channel.send_text(text, &[]).unwrap();
        let taken = successor.take(VERSION);
        assert!(matches!(taken, Err(PathError::Garbage)), "{taken:?}");
    }
    let successor = place.connect();
    let accepted = place.accept();
    accepted.channel.send_text(TAKE_OVER, &[]).unwrap();
    assert!(matches!(successor.relieve(), Err(PathError::Garbage)));
}

#[test]
fn a_socket_of_another_kind_is_no_predecessor() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("socket");
    let access = SocketAccess::default();
    let _socket = SocketFile::bind(&path, PacketType::Stream, access).unwrap();
    assert!(matches!(Predecessor::connect(&path), Err(PathError::Io(_))));
}

#[test]
fn nobody_who_connects_is_nobody_to_hand_over_to() {
    let place = Place::new();
    let accepted = Successor::accept(place.socket.as_fd(), geteuid(), place.stop.as_fd());
    assert!(accepted.unwrap().is_none());
}

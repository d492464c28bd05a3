//! A [`Snapshot`] as JSON: the text that `serde_json::to_string` returns for it, generated connection by connection.

use std::io;
use std::iter;
use std::rc::Rc;

use super::Chunks;
use super::counters::{Snapshot, VmSnapshot};

/// The path of it on the stats socket.
pub const PATH: &str = "/json";

/// The media type of [`chunks`].
pub(super) const CONTENT_TYPE: &str = "application/json";

/// The snapshot as JSON.
pub(super) fn chunks(snapshot: Rc<Snapshot>) -> Chunks {
    let opening = head(&snapshot);
    let vms = (0..snapshot.vms.len()).flat_map(move |index| vm(snapshot.clone(), index));
    Box::new(
        iter::once(opening)
            .chain(vms)
            .chain(iter::once(Ok(CLOSING.to_owned()))),
    )
}

/// What comes before the first VM. They are the last member.
fn head(snapshot: &Snapshot) -> io::Result<String> {
    let without_vms = Snapshot {
        version: snapshot.version.clone(),
        vms: Vec::new(),
    };
    let mut text = serde_json::to_string(&without_vms)?;
    text.truncate(text.len() - CLOSING.len());
    Ok(text)
}

fn vm(snapshot: Rc<Snapshot>, vm: usize) -> impl Iterator<Item = io::Result<String>> {
    let separator = |index: usize| if index == 0 { "" } else { "," };
    let opening = opening(&snapshot.vms[vm]).map(|text| separator(vm).to_owned() + &text);
    let connections = (0..snapshot.vms[vm].connections.len()).map(move |index| {
        let connection = serde_json::to_string(&snapshot.vms[vm].connections[index])?;
        Ok(separator(index).to_owned() + &connection)
    });
    iter::once(opening)
        .chain(connections)
        .chain(iter::once(Ok(CLOSING.to_owned())))
}

/// Ends an array, and the object whose last member it is.
const CLOSING: &str = "]}";

/// A VM up to its first connection. They are its last member.
fn opening(vm: &VmSnapshot) -> io::Result<String> {
    let without_connections = VmSnapshot {
        counters: vm.counters.clone(),
        connections: Vec::new(),
        ..*vm
    };
    let mut text = serde_json::to_string(&without_connections)?;
    text.truncate(text.len() - CLOSING.len());
    Ok(text)
}

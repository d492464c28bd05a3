//! ssh from the host into a guest, with a key of the test's own.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::guest::{Guest, GuestProcess, installed};

/// Makes a key that the guest's sshd shall accept.
pub fn make_key(path: &Path) {
    let made = Command::new(installed("ssh-keygen"))
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "the-test", "-f"])
        .arg(path)
        .status();
    assert!(made.unwrap().success(), "ssh-keygen failed");
}

/// The arguments of `ssh` for a command in the guest, whose sshd is behind the plain `socket`.
pub fn arguments(socket: &Path, key: &Path, command: &str) -> Vec<String> {
    let proxy = format!("{} -U {}", installed("nc").display(), socket.display());
    let options = [
        "BatchMode=yes",
        "LogLevel=ERROR",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        &format!("ProxyCommand={proxy}"),
    ];
    let options = options.map(|option| ["-o".to_owned(), option.to_owned()]);
    let key = key.display().to_string();
    let start = ["-F", "none", "-i", &key].map(str::to_owned);
    let end = ["root@vm", command].map(str::to_owned);
    [&start[..], &options.concat(), &end].concat()
}

/// Starts sshd in the guest, which has the host's files read only.
pub fn serve(guest: &Guest, port: u32, key: &Path) -> GuestProcess {
    // It rejects a root without a readable password entry, or with a locked one.
    guest.run_ok(
        "echo 'root:*:1:0:99999:7:::' >/run/shadow && mount --bind /run/shadow /etc/shadow",
    );
    guest.run_ok("mkdir -p /run/sshd && ssh-keygen -q -t ed25519 -N '' -f /run/host_key");
    let key = fs::read_to_string(key.with_extension("pub")).unwrap();
    write_file(guest, "/run/authorized_keys", &key);
    write_file(
        guest,
        "/run/sshd_config",
        "HostKey /run/host_key\nAuthorizedKeysFile /run/authorized_keys\nStrictModes no\nUsePAM no\n",
    );
    guest.spawn(&format!(
        "exec socat VSOCK-LISTEN:{port},fork EXEC:'/usr/sbin/sshd -i -f /run/sshd_config'"
    ))
}

fn write_file(guest: &Guest, path: &str, text: &str) {
    let writer = guest.spawn(&format!("cat >{path}"));
    writer.write(text);
    writer.close_stdin();
    writer.wait_ok();
}

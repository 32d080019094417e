//! Input that cannot be stored, places that cannot be used, and bytes that lie: each is named, and
//! whatever can go on does.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{check, diff, lowtide, make_input, processes, start_staying, text, wait_until};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// The command without the right to read what permissions forbid, which the superuser has.
fn humble(args: &[&str]) -> Command {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(secret.path(), fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(secret.path()).is_err() {
        return lowtide(args);
    }
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-dac_override,-dac_read_search");
    command.arg(env!("CARGO_BIN_EXE_lowtide")).args(args);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A state with 60 files in it, none of whose servers has made a checkpoint.
fn stored(dir: &Path) -> PathBuf {
    let (input, state) = (dir.join("in"), dir.join("state"));
    fs::create_dir(&input).unwrap();
    for i in 0..60 {
        fs::write(input.join(format!("f{i}")), vec![i as u8; 3000]).unwrap();
    }
    let run = lowtide(&["run", "--clients", "1", "--input", text(&input)])
        .args(["--state", text(&state)])
        .output();
    check(&run.unwrap(), 0);
    state
}

fn export(state: &Path, to: &Path) -> Output {
    lowtide(&["export", "--state", text(state), "--to", text(to)])
        .output()
        .unwrap()
}

#[test]
fn what_cannot_be_read_is_named_and_decides_the_exit_status() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 10);
    let close = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    fs::write(input.join("secret"), "x").unwrap();
    close(&input.join("secret"));
    fs::create_dir(input.join("closed")).unwrap();
    fs::write(input.join("closed/inside"), "x").unwrap();
    close(&input.join("closed"));
    let run = |extra: &[&str]| {
        humble(&["run", "--clients", "1", "--input", text(&input)])
            .args(extra)
            .output()
            .unwrap()
    };
    let output = run(&["--report", "-"]);
    check(&output, 4);
    let said = stdout(&output) + &stderr(&output);
    for name in ["secret", "closed"] {
        assert!(
            said.contains(&format!("cannot be read: {name}: ")),
            "{said}"
        );
    }
    assert!(said.contains("\"unreadable\": 2"), "{said}");
    assert!(said.contains("\"mismatches\": 0"), "{said}");
    check(&run(&["--skip-unreadable"]), 0);
    fs::set_permissions(input.join("closed"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn special_files_are_named_and_odd_names_come_back() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 10);
    for name in [&b"\xff\xfe"[..], b"caf\xe9", b"new\nline", b" ", b"-rf"] {
        fs::write(input.join(OsStr::from_bytes(name)), name).unwrap();
    }
    fs::write(input.join("nothing"), "").unwrap();
    for name in ["first", "d1/second", "empty/third"] {
        match name {
            "first" => fs::write(input.join(name), "one inode").unwrap(),
            _ => fs::hard_link(input.join("first"), input.join(name)).unwrap(),
        }
    }
    let made = Command::new("mkfifo").arg(input.join("pipe")).status();
    assert!(made.unwrap().success());
    let _socket = UnixListener::bind(input.join("socket")).unwrap();
    let made = Command::new("mknod")
        .arg(input.join("null"))
        .args(["c", "1", "3"])
        .stderr(std::process::Stdio::null())
        .status();
    let mut special = vec!["pipe", "socket"];
    // Only the superuser makes devices.
    special.extend(made.unwrap().success().then_some("null"));
    let output = lowtide(&["run", "--input", text(&input), "--state", text(&state)])
        .output()
        .unwrap();
    check(&output, 0);
    let said = stdout(&output);
    for name in &special {
        assert!(said.contains(&format!("skipped: {name}: ")), "{said}");
        fs::remove_file(input.join(name)).unwrap();
    }
    let out = tmp.path().join("out");
    check(&export(&state, &out), 0);
    diff(&input, &out);
    use std::os::unix::fs::MetadataExt;
    let ino = |name: &str| fs::metadata(out.join(name)).unwrap().ino();
    assert!(ino("first") == ino("d1/second") && ino("first") == ino("empty/third"));
}

#[test]
fn a_file_that_changes_meanwhile_is_named_and_is_no_mismatch() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 50);
    let path = input.join("growing");
    let mut file = fs::File::create(&path).unwrap();
    let over = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                file.write_all(b"more").unwrap();
                file.flush().unwrap();
                std::thread::yield_now();
            }
        });
        let output = lowtide(&["run", "--clients", "1", "--input", text(&input)])
            .args(["--report", "-"])
            .output();
        over.store(true, Ordering::Relaxed);
        output.unwrap()
    });
    check(&output, 0);
    let said = stdout(&output) + &stderr(&output);
    assert!(said.contains("changed during the run: growing: "), "{said}");
    assert!(said.contains("\"mismatches\": 0"), "{said}");
}

#[test]
fn a_state_of_another_version_is_left_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 10);
    fs::create_dir(&state).unwrap();
    fs::write(state.join("lowtide.toml"), "version = 9\n").unwrap();
    let out = tmp.path().join("out");
    let run = lowtide(&["run", "--input", text(&input), "--state", text(&state)]).output();
    let verify = lowtide(&["verify", "--state", text(&state)]).output();
    for output in [run.unwrap(), verify.unwrap(), export(&state, &out)] {
        check(&output, 2);
        let said = stderr(&output);
        assert!(
            said.contains("state of version 9, this lowtide knows version 2"),
            "{said}"
        );
    }
    assert_eq!(fs::read_dir(&state).unwrap().count(), 1);
}

#[test]
fn who_stops_reading_ends_a_command_and_a_full_place_is_left_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let state = stored(tmp.path());
    let mut unread = lowtide(&["verify", "--state", text(&state)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(unread.stdout.take());
    let output = unread.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(141), ""));
    let output = export(&state, &tmp.path().join("in"));
    check(&output, 2);
    assert!(stderr(&output).contains("in: not empty"));
    assert_eq!(stdout(&output), "", "nothing was recovered for that");
}

#[test]
fn a_taken_address_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut cluster = "version = 1\n".to_owned();
    for (id, (name, role, address)) in (1..).zip([
        ("root", "root", address.to_string()),
        ("meta0", "meta", "127.0.0.2:4791".to_owned()),
        ("object0", "object", "127.0.0.3:4791".to_owned()),
    ]) {
        cluster += &format!(
            "[[node]]\nname = \"{name}\"\nid = {id}\nrole = \"{role}\"\naddress = \"{address}\"\n"
        );
    }
    fs::write(tmp.path().join("cluster.toml"), cluster).unwrap();
    let node = tmp.path().join("node.toml");
    let text_of = "version = 1\ncluster = \"cluster.toml\"\nname = \"root\"\ndir = \"data\"\n\
                   control = \"control.sock\"\n";
    fs::write(&node, text_of).unwrap();
    let output = lowtide(&["node", "--config", text(&node)])
        .output()
        .unwrap();
    check(&output, 3);
    let said = stderr(&output);
    assert!(said.contains(&address.to_string()), "{said}");
    let by = format!("in use by process {} (", std::process::id());
    assert!(said.contains(&by), "{said}");
}

#[test]
fn a_log_that_lost_committed_records_is_refused_and_says_where() {
    let tmp = tempfile::tempdir().unwrap();
    let state = stored(tmp.path());
    let data = state.join("object0/data");
    let segment = data.join("shard-000-00000.seg");
    let whole = fs::read(&segment).unwrap();
    let log = || lowtide(&["log", "--verify", text(&data)]).output().unwrap();
    check(&log(), 0);

    // One bit of the newest record that a later one says was durable, behind the mark by which a
    // record is known. What came last is in no other record's words.
    let is_record = |at: &usize| whole[*at..].starts_with(b"LTRC");
    let word = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap());
    let records = (12288..whole.len()).step_by(64).filter(is_record);
    let records: Vec<usize> = records.collect();
    let (lsn, durable) = (|at: usize| word(at + 8), |at: usize| word(at + 32));
    let told = records.iter().map(|at| durable(*at)).max().unwrap();
    let vouched = records.iter().rfind(|at| lsn(**at) < told);
    let at = vouched.expect("several groups were committed") + 20;
    let file = fs::File::options().write(true).open(&segment).unwrap();
    file.write_all_at(&[whole[at] ^ 1], at as u64).unwrap();
    let output = log();
    check(&output, 1);
    assert!(
        stdout(&output).contains("damaged record"),
        "{}",
        stdout(&output)
    );
    let said = stderr(&output);
    assert!(
        said.contains("shard-000-00000.seg: a committed record is missing at byte"),
        "{said}"
    );
    let output = export(&state, &tmp.path().join("out"));
    check(&output, 3);
    let said = stderr(&output);
    assert!(
        said.contains("object0/data") && said.contains("committed records are missing"),
        "{said}"
    );
    file.write_all_at(&[whole[at]], at as u64).unwrap();

    // The end of the file.
    file.set_len(8192).unwrap();
    check(&log(), 1);
    let output = export(&state, &tmp.path().join("out"));
    check(&output, 3);
    assert!(
        stderr(&output).contains("8192 bytes long"),
        "{}",
        stderr(&output)
    );

    // The whole file.
    fs::remove_file(&segment).unwrap();
    let output = export(&state, &tmp.path().join("out"));
    check(&output, 3);
    let said = stderr(&output);
    // Depending on whether the next segment was made already.
    assert!(
        said.contains("records from 0 on are needed") || said.contains("no segment file is left"),
        "{said}"
    );
    assert!(!tmp.path().join("out").exists());

    fs::write(&segment, &whole).unwrap();
    check(&export(&state, &tmp.path().join("out")), 0);
    diff(&tmp.path().join("in"), &tmp.path().join("out"));
}

#[test]
fn a_torn_end_is_what_a_crash_leaves_and_is_said_to_be_one() {
    let tmp = tempfile::tempdir().unwrap();
    let state = stored(tmp.path());
    let data = state.join("object0/data");
    let before = lowtide(&["log", "--verify", text(&data)]).output().unwrap();
    check(&before, 0);
    let end = stdout(&before)
        .lines()
        .find(|line| line.starts_with("shard-000-00000.seg"))
        .and_then(|line| line.split("byte ").nth(1)?.split(':').next()?.parse().ok())
        .expect("the log's end is told");
    // As if another record had been on its way.
    let segment = fs::File::options()
        .write(true)
        .open(data.join("shard-000-00000.seg"))
        .unwrap();
    segment.write_all_at(b"LTRC half of a record", end).unwrap();
    let after = lowtide(&["log", "--verify", text(&data)]).output().unwrap();
    check(&after, 0);
    assert!(
        !stdout(&after).contains(&format!("byte {end}: nothing written")),
        "{}",
        stdout(&after)
    );
    check(&export(&state, &tmp.path().join("out")), 0);
    diff(&tmp.path().join("in"), &tmp.path().join("out"));
}

/// `object0` of a stopped cluster is on another storage than its own, or on none.
#[test]
fn a_server_whose_storage_is_gone_or_another_is_named_and_not_let_in() {
    let tmp = tempfile::tempdir().unwrap();
    let state = stored(tmp.path());
    let (data, own) = (state.join("object0/data"), tmp.path().join("own"));
    fs::rename(&data, &own).unwrap();
    let out = tmp.path().join("out");
    for is_empty in [false, true] {
        if is_empty {
            fs::create_dir(&data).unwrap();
        }
        let output = export(&state, &out);
        check(&output, 3);
        let said = stderr(&output);
        assert!(
            said.contains("object0/data: its storage is gone")
                && said.contains("put the directory"),
            "{said}"
        );
        assert_eq!(data.exists(), is_empty, "nothing is put in its place");
        assert!(!out.exists());
    }

    // The same for a node that starts: the root, and an object server on what is empty.
    let start = |name: &str| {
        let config = state.join(name).join("node.toml");
        let mut command = lowtide(&["node", "--config", text(&config)]);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut root = start("root");
    let refused = start("object0").wait_with_output().unwrap();
    check(&refused, 3);
    let said = stderr(&refused);
    assert!(
        said.contains("lowtide: object0 left: its storage is another than the cluster knows"),
        "{said}"
    );
    let socket = state.join("root/control.sock");
    let status = lowtide(&["status", "--control", text(&socket)]).output();
    let said = stdout(&status.unwrap());
    assert!(said.contains("1 servers not let in"), "{said}");
    rustix::process::kill_process(Pid::from_child(&root), Signal::TERM).unwrap();
    assert_eq!(root.wait().unwrap().code(), Some(0));

    // An empty storage that a start has made is another one to `export` as well.
    let output = export(&state, &out);
    check(&output, 3);
    let said = stderr(&output);
    assert!(
        said.contains("object0/data: its storage is another than the cluster knows"),
        "{said}"
    );
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&own, &data).unwrap();
    check(&export(&state, &out), 0);
    diff(&tmp.path().join("in"), &out);
}

/// Datagrams that are none of ours, or nearly.
fn rubbish(seed: u32) -> Vec<Vec<u8>> {
    let mut state = seed | 1;
    let mut byte = || {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    let lengths = [0, 1, 11, 12, 15, 16, 17, 64, 256, 1024, 4112, 9000, 65_507];
    let mut all: Vec<Vec<u8>> = lengths
        .iter()
        .map(|&length| (0..length).map(|_| byte()).collect())
        .collect();
    // Base transport headers to existing queue pair numbers, right up to the checksum.
    for opcode in [0x04, 0x0a, 0x0c, 0x11, 0x13, 0x64, 0x81] {
        for length in [12, 16, 40, 280] {
            let mut datagram = vec![opcode, 0x40, 0xff, 0xff, 0, 0, 0, 1, 0x80, 0, 0, 1];
            datagram.resize(length, byte());
            all.push(datagram);
        }
    }
    all
}

#[test]
fn rubbish_on_the_wire_is_counted_and_dropped() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 20);
    let mut run = start_staying(&input, &state);
    let before = processes(&state);
    let cluster = fs::read_to_string(state.join("cluster.toml")).unwrap();
    let addresses: Vec<&str> = cluster
        .lines()
        .filter_map(|line| line.strip_prefix("address = \"")?.strip_suffix('"'))
        .collect();
    assert_eq!(addresses.len(), before.len());
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let dropped = || -> u64 {
        let output = lowtide(&["status", "--json", "--state", text(&state)]).output();
        let status: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        let nodes = status.as_object().unwrap().values();
        nodes
            .map(|node| {
                node["status"]["counters"]["datagrams_dropped"]
                    .as_u64()
                    .expect("every node answers")
            })
            .min()
            .unwrap()
    };
    assert_eq!(dropped(), 0);
    for round in 0..5 {
        for address in &addresses {
            for datagram in rubbish(round) {
                // A full buffer on the other side is no failure of this one.
                let _ = socket.send_to(&datagram, address);
            }
        }
    }
    wait_until("some node counts nothing as dropped", || dropped() > 0);
    let listed = lowtide(&["ls", "--state", text(&state), "/d1"]).output();
    check(&listed.unwrap(), 0);
    assert_eq!(processes(&state), before, "nobody died");
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn perftest_peer_says_what_is_wrong_and_ends_at_ctrl_c() {
    let peer = |args: &[&str]| {
        let mut command = lowtide(&["perftest-peer"]);
        command.args(args).stderr(Stdio::piped());
        command
    };
    let said = |args: &[&str], status| {
        let output = peer(args).output().unwrap();
        check(&output, status);
        stderr(&output)
    };
    let here = ["--address", "127.48.9.1"];
    assert!(said(&["ib_write_bw"], 2).contains("--address"));
    let unknown = said(&[&["ib_write_lat"][..], &here].concat(), 2);
    assert!(unknown.contains("ib_write_bw"), "{unknown}");
    let wrong = said(&[&["ib_read_bw", "-c", "ud"][..], &here].concat(), 2);
    assert!(wrong.contains("ib_read_bw does not know Ud"), "{wrong}");
    let nobody = said(
        &[&["ib_send_lat", "-p", "1", "127.0.0.1"][..], &here].concat(),
        3,
    );
    assert!(
        nobody.contains("start `ib_send_lat` there first"),
        "{nobody}"
    );
    let elsewhere = said(&["ib_send_lat", "--address", "192.0.2.1"], 3);
    assert!(elsewhere.contains("lowtide devices"), "{elsewhere}");

    // Like every program that lets the system end it, it ignores SIGINT if its parent does, as a shell's
    // background job may. Not so under `env`.
    let waiting = peer(&[&["ib_write_bw", "-p", "0"][..], &here].concat());
    let mut waiting = Command::new("env")
        .arg("--default-signal=INT")
        .arg(waiting.get_program())
        .args(waiting.get_args())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = BufReader::new(waiting.stderr.take().unwrap());
    lines.read_line(&mut line).unwrap();
    assert!(
        line.starts_with("waiting for ib_write_bw on TCP port"),
        "{line}"
    );
    let pid = Pid::from_child(&waiting);
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let status = waiting.wait().unwrap();
    assert_eq!(status.signal(), Some(2), "{status}");
}

//! The examples are what people copy: each one runs to its end.
//!
//! They are the programs that `cargo test` builds beside this one, each short enough to be read at once.

use std::process::Command;

#[track_caller]
fn runs(name: &str, args: &[&str], says: &str) {
    let here = std::env::current_exe().unwrap();
    let built = here.parent().and_then(|deps| deps.parent()).unwrap();
    let program = built.join("examples").join(name);
    assert!(
        program.exists(),
        "{} is not built; cargo build -p lowtide-transport --examples",
        program.display()
    );
    // An example that hangs is one that fails.
    let output = Command::new("timeout")
        .arg("100")
        .arg(program)
        .args(args)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {said}{complaint}");
    assert!(said.contains(says), "{name} says {said}");
}

/// Lines of an example at most.
const LINES_MAX: usize = 79;

#[test]
fn every_example_is_one_short_file_and_is_run_here() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).expect("a file, no folder");
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{}: {lines} lines", path.display());
        names.push(path.file_stem().unwrap().to_str().unwrap().to_owned());
    }
    names.sort_unstable();
    assert_eq!(names, ["awaits", "lookup", "pingpong", "rpc"]);
}

#[test]
fn pingpong() {
    runs("pingpong", &[], "wrote and read 1048576 bytes");
}

#[test]
fn pingpong_that_loses_packets() {
    runs("pingpong", &["--drop", "2", "--seed", "7"], "1000 messages");
}

#[test]
fn rpc() {
    runs("rpc", &[], "1000 calls");
}

#[test]
fn lookup() {
    runs("lookup", &[], "2000 lookups");
}

#[test]
fn awaits() {
    runs("awaits", &[], "1000 messages awaited");
}

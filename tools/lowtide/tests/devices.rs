//! A machine without RDMA: no library, one that is broken, one without the kernel's support, one that
//! finds nothing. Each is told by its words, and softroce serves.
//!
//! The libraries are made here, by the C compiler that every Rust machine has.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{check, lowtide, text};
use serde_json::Value;

const NO_KERNEL_SUPPORT: &str = "the kernel has no RDMA support loaded";
const NOTHING_THERE: &str = "there is no RDMA device";
const OTHER_ERROR: &str = "libibverbs cannot list devices: ";
const NO_LIBRARY: &str = "libibverbs is not installed";

/// Builds a libibverbs.so.1 in `dir` that fails to list devices with this error, or lists none.
fn build(dir: &Path, list_errno: Option<&str>) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let script = format!("-Wl,--version-script={}", text(&data.join("ibverbs.map")));
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", &script])
        .arg("-Wl,-soname,libibverbs.so.1")
        .args(list_errno.map(|errno| format!("-DLIST_ERRNO={errno}")))
        .arg(data.join("ibverbs.c"))
        .arg("-o")
        .arg(dir.join("libibverbs.so.1"));
    check(&cc.output().expect("a C compiler"), 0);
}

/// The command with whatever libibverbs lies in `dir`.
fn with_library(dir: &Path, args: &[&str]) -> Output {
    lowtide(args).env("LD_LIBRARY_PATH", dir).output().unwrap()
}

#[test]
fn no_device_is_no_failure_and_has_a_reason() {
    type Make = fn(&Path);
    let cases: [(Make, &str); 4] = [
        (|dir| build(dir, Some("ENOSYS")), NO_KERNEL_SUPPORT),
        (|dir| build(dir, None), NOTHING_THERE),
        (|dir| build(dir, Some("EACCES")), OTHER_ERROR),
        (
            |dir| fs::write(dir.join("libibverbs.so.1"), "no library").unwrap(),
            NO_LIBRARY,
        ),
    ];
    for (make, reason) in cases {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let plain = with_library(dir.path(), &["devices"]);
        check(&plain, 0);
        let said = String::from_utf8(plain.stdout).unwrap();
        assert!(
            said.contains(&format!("verbs     none: {reason}")),
            "{said}"
        );
        assert!(said.contains("softroce  127.0.0.1 on lo"), "{said}");
        let json = with_library(dir.path(), &["devices", "--json"]);
        check(&json, 0);
        let survey: Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(survey["verbs"], Value::Array(Vec::new()));
        let why = survey["no_verbs"].as_str().unwrap();
        assert!(why.starts_with(reason), "{why}");
        // Who insists is refused for the same reason.
        let state = dir.path().join("state");
        let run = ["run", "--provider", "verbs", "--state", text(&state)];
        let refused = with_library(
            dir.path(),
            &[&run[..], &["--input", "/etc/hostname"]].concat(),
        );
        assert!(!refused.status.success());
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains(reason), "{said}");
    }
}

/// The command starts where nothing of RDMA is installed: it needs none of that to be loaded.
#[test]
fn no_library_of_rdma_is_needed_to_start() {
    let program = env!("CARGO_BIN_EXE_lowtide");
    // It comes with the linker.
    let output = Command::new("readelf").args(["-d", program]).output();
    let output = output.expect("binutils");
    check(&output, 0);
    let said = String::from_utf8(output.stdout).unwrap();
    let needed = said.lines().filter(|line| line.contains("(NEEDED)"));
    let needed: Vec<_> = needed
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    assert!(
        needed.iter().any(|name| name.starts_with("libc.so")),
        "{said}"
    );
    for name in needed {
        let is_plain = [
            "libc.so",
            "libm.so",
            "libgcc_s.so",
            "ld-linux",
            "libdl.so",
            "libpthread.so",
        ];
        assert!(
            is_plain.iter().any(|plain| name.starts_with(plain)),
            "{name}"
        );
    }
}

//! C programs against the shared library: compiled strictly, run on loopback addresses.
//!
//! They are linked with the library that cargo has just built beside this test.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

use lowtide_transport::pcap::Reader;

/// A directory that goes away, with programs.
struct Programs(PathBuf);

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An address of this process alone.
fn address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{}.{last}", 32 + (pid >> 8 & 31), pid & 255)
}

impl Programs {
    fn new(name: &str) -> Programs {
        let dir = format!("lowtide-capi-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        // The name that programs ask the loader for.
        let major = env!("CARGO_PKG_VERSION_MAJOR");
        let built = std::env::current_exe().unwrap();
        let built = built.parent().unwrap().join("liblowtide_capi.so");
        let soname = dir.join(format!("liblowtide.so.{major}"));
        std::os::unix::fs::symlink(built, soname).unwrap();
        Programs(dir)
    }

    fn compile(&self, source: &str) -> PathBuf {
        let program = self.0.join("program");
        let major = env!("CARGO_PKG_VERSION_MAJOR");
        let status = Command::new("cc")
            .args([
                "-std=c11",
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-I",
            ])
            .args([root().join("include"), root().join(source)])
            .arg(self.0.join(format!("liblowtide.so.{major}")))
            .arg(format!("-Wl,-rpath,{}", self.0.display()))
            .arg("-o")
            .arg(&program)
            .status()
            .expect("a C compiler");
        assert!(status.success(), "{source} compiles without a warning");
        program
    }
}

fn start(program: &Path, args: &[&str]) -> Child {
    // It hangs only if it waits for what never comes.
    Command::new("timeout")
        .arg("100")
        .arg(program)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("coreutils")
}

#[track_caller]
fn succeeds(output: Output, says: &str) {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {out}{err}", output.status);
    assert_eq!(out.trim(), says);
}

#[test]
fn every_call_does_what_the_header_says() {
    let programs = Programs::new("verbs");
    let program = programs.compile("tests/verbs.c");
    let capture = programs.0.join("verbs.pcap");
    let args = [&address(), &address(), capture.to_str().unwrap()];
    let child = start(&program, &args);
    succeeds(child.wait_with_output().unwrap(), "all of it holds");
    // A SEND and its ACK, each as it left and as it came.
    let mut reader = Reader::new(std::fs::File::open(&capture).unwrap()).unwrap();
    let mut opcodes = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        let datagram = frame.datagram().expect("every packet is a datagram");
        opcodes.push(datagram.payload[0]);
    }
    assert!(opcodes.len() >= 4, "{opcodes:?}");
    opcodes.sort_unstable();
    opcodes.dedup();
    assert_eq!(opcodes, [0x04, 0x11]);
}

#[test]
fn two_processes_play_ping_pong() {
    let programs = Programs::new("pingpong");
    let program = programs.compile("examples/pingpong.c");
    let (server, client) = (address(), address());
    let mut serving = start(&program, &[&server]);
    // A client that comes too early is refused.
    let mut said = [0; b"listening\n".len()];
    let heard = serving.stdout.as_mut().unwrap().read_exact(&mut said);
    if heard.is_err() || said != *b"listening\n" {
        panic!("{said:?}: {:?}", serving.wait_with_output());
    }
    let playing = start(&program, &[&client, &server]);
    succeeds(playing.wait_with_output().unwrap(), "1000 rounds");
    succeeds(serving.wait_with_output().unwrap(), "1000 rounds");
}

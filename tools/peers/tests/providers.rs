//! One conversation for every provider: softroce over UDP, by rings, with direct accesses, and each
//! device of libibverbs that this machine has, in both roles against softroce and against itself.
//! `ci/guest/verbs` holds the same conversation on the kernel's rxe.

#[path = "../src/bin/providers/conversation.rs"]
mod conversation;
#[path = "../src/bin/providers/parts.rs"]
mod parts;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use conversation::converse;
use lowtide_transport::ibv;

/// Operations of a conversation that drives: six for each of eight sizes, and six more.
const OPERATIONS: u32 = 6 * 8 + 6;

fn speak(client: &str, server: &str) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let there = listener.local_addr().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let stream = listener.accept().unwrap().0;
            let served = converse(server, stream, false);
            assert!(served.is_ok(), "{server}: {served:?}");
        });
        let driven = converse(client, TcpStream::connect(there).unwrap(), true);
        // A device of libibverbs may have neither ATOMIC WRITE nor FLUSH.
        let is_verbs = [client, server]
            .iter()
            .any(|each| each.starts_with("verbs"));
        let least = OPERATIONS - if is_verbs { 2 } else { 0 };
        let driven = driven.expect(client);
        assert!(
            (least..=OPERATIONS).contains(&driven),
            "{client} to {server}: {driven}"
        );
    });
}

/// A provider of softroce at an address that no other test has.
fn softroce(kind: &str) -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let (high, low) = ((process >> 7) as u8 & 0x7F | 0x80, process as u8 & 0x7F);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{kind}:{}", Ipv4Addr::new(127, high, 1 + low, next | 0x80))
}

#[test]
fn softroce_speaks_the_same_whichever_way_its_packets_go() {
    for kind in ["softroce", "rings", "host"] {
        speak(&softroce(kind), &softroce(kind));
    }
    // Each side says what it can do, and the lesser of two is done.
    speak(&softroce("host"), &softroce("rings"));
}

#[test]
fn every_device_of_libibverbs_speaks_it_too() {
    // No device is no failure: then the guest of `ci/guest/verbs` is the one that proves it.
    for device in ibv::devices().unwrap_or_default() {
        let verbs = format!("verbs:{}", device.name);
        speak(&verbs, &verbs);
    }
}

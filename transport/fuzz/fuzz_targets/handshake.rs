#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lowtide_transport::fuzz::handshake(data));

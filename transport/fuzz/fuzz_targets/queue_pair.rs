#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lowtide_transport::fuzz::queue_pair(data));

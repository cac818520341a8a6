#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| omni_fuzz::answers::check(data));

//! Gives the shared library its versioned name.

fn main() {
    // The part of the version that changes when programs must be compiled again.
    let major = env!("CARGO_PKG_VERSION_MAJOR");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,liblowtide.so.{major}");
    println!("cargo:rerun-if-changed=build.rs");
}

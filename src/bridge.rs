//! The loopback bridge between Nix and an S3 cache.

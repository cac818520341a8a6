//! From a namespace to a published version.

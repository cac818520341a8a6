//! Credentials for S3: environment, then profile files, then the instance's metadata service, version 2.

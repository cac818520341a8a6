//! The objects: `s3s-fs` behind one lock, with what it leaves out or gets wrong.
//!
//! **Every write is staged, then committed.** A body is received and hashed by `s3s-fs` under a name of
//! its own in a hidden bucket, with no lock held, however long that takes. Only then, under the lock, is
//! the condition compared with the object of that moment and the staged files renamed over it. So
//! compare-and-swap is exact, uploads run side by side, and a body that does not match its hash never
//! replaces anything. Readers hold the lock while they open the file and read its ETag, which therefore
//! belong together; the open file outlives a rename.
//!
//! Limits: a key is a path, so `a` and `a/b` cannot both exist, a segment may not be empty, `.` or `..`,
//! and a key ends at about 150 bytes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyper::http::{Extensions, HeaderMap, Method, StatusCode, Uri};
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::RwLock;
use tokio_util::io::ReaderStream;

use crate::faults::Control;

/// No valid name of a bucket, so no request can name it and no listing shows it.
const STAGING: &str = ".staging";

/// `s3s-fs` reads 4 KiB at a time, which costs more than the transfer itself.
const READ_SIZE: usize = 256 * 1024;

/// What S3 lists at most in one answer, whatever is asked for.
const MAX_KEYS: i32 = 1000;

#[derive(Debug)]
pub struct Store {
    files: FileSystem,
    root: PathBuf,
    lock: RwLock<()>,
    staged: AtomicU64,
    control: Arc<Control>,
}

impl Store {
    /// Opens the directory, making it if there is none. Objects of an earlier run are kept.
    pub fn open(root: &Path, control: Arc<Control>) -> Result<Self, crate::Error> {
        let error = |error| format!("root {}: {error}", root.display());
        std::fs::create_dir_all(root).map_err(error)?;
        let root = root.canonicalize().map_err(error)?;
        let staging = root.join(STAGING);
        match std::fs::remove_dir_all(&staging) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(e).into()),
            _ => std::fs::create_dir(&staging).map_err(error)?,
        }
        let files = FileSystem::new(&root).map_err(|e| format!("root {}: {e:?}", root.display()))?;
        Ok(Self { files, root, lock: RwLock::default(), staged: AtomicU64::default(), control })
    }

    pub fn ensure_bucket(&self, name: &str) -> Result<(), crate::Error> {
        if !s3s::path::check_bucket_name(name) {
            return Err(format!("'{name}' is not a name for a bucket").into());
        }
        let made = std::fs::create_dir_all(self.root.join(name));
        made.map_err(|error| format!("bucket {name}: {error}").into())
    }

    fn require_bucket(&self, bucket: &str) -> S3Result<()> {
        if self.root.join(bucket).is_dir() {
            return Ok(());
        }
        Err(s3_error!(NoSuchBucket, "no bucket '{bucket}'"))
    }

    /// Where the object's bytes are, or would be. Refuses what no path can stand for: `s3s-fs` would
    /// follow `..` into another bucket, past the sender's rights.
    fn object_path(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        self.require_bucket(bucket)?;
        if key.split('/').any(|s| matches!(s, "" | "." | "..")) {
            return Err(s3_error!(
                InvalidArgument,
                "this test server stores keys as paths and cannot hold '{key}'"
            ));
        }
        let longest = sidecars(bucket, key).map(|name| name.len()).into_iter().max();
        if longest.is_some_and(|length| length > 255) {
            return Err(s3_error!(KeyTooLongError));
        }
        Ok(self.root.join(bucket).join(key))
    }

    /// As [`Self::object_path`], for an object that must be there.
    fn existing_path(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        let path = self.object_path(bucket, key)?;
        // A directory on the way to other keys is no object.
        if path.is_file() {
            return Ok(path);
        }
        Err(s3_error!(NoSuchKey, "no object '{key}'"))
    }

    fn staging_key(&self) -> String {
        self.staged.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Makes a staged object the current one. The caller holds the lock.
    fn commit(&self, staged: &str, bucket: &str, key: &str) -> S3Result<()> {
        let target = self.object_path(bucket, key)?;
        let parent = target.parent().unwrap_or(&self.root);
        let clash = |error: io::Error| {
            s3_error!(
                error,
                InvalidArgument,
                "this test server stores keys as paths: '{key}' runs through another object, or is a \
                 folder of others"
            )
        };
        std::fs::create_dir_all(parent).map_err(clash)?;
        std::fs::rename(self.root.join(STAGING).join(staged), &target).map_err(clash)?;
        let pairs = sidecars(STAGING, staged).into_iter().zip(sidecars(bucket, key));
        for (from, to) in pairs {
            match std::fs::rename(self.root.join(from), self.root.join(&to)) {
                // A copy of an object without attributes has none either.
                Err(e) if e.kind() == io::ErrorKind::NotFound => self.remove(&to)?,
                result => result.map_err(S3Error::internal_error)?,
            }
        }
        Ok(())
    }

    /// Removes what a write left behind that was not committed.
    fn discard(&self, staged: &str) {
        let _ = self.remove(&format!("{STAGING}/{staged}"));
        for name in sidecars(STAGING, staged) {
            let _ = self.remove(&name);
        }
    }

    fn remove(&self, name: &str) -> S3Result<()> {
        match std::fs::remove_file(self.root.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(S3Error::internal_error(e)),
            _ => Ok(()),
        }
    }

    /// Removes the object and its sidecars, so that a later object of that name starts afresh.
    fn delete(&self, bucket: &str, key: &str) -> S3Result<()> {
        match self.existing_path(bucket, key) {
            Ok(_) => {}
            Err(e) if *e.code() == S3ErrorCode::NoSuchKey => return Ok(()),
            Err(e) => return Err(e),
        }
        self.remove(&format!("{bucket}/{key}"))?;
        sidecars(bucket, key).iter().try_for_each(|name| self.remove(name))
    }

    /// The object's ETag, or `None` if there is no object. The caller holds the lock.
    async fn etag(&self, bucket: &str, key: &str) -> S3Result<Option<ETag>> {
        match self.existing_path(bucket, key) {
            Ok(_) => {}
            Err(e) if *e.code() == S3ErrorCode::NoSuchKey => return Ok(None),
            Err(e) => return Err(e),
        }
        // Read here, because a listing asks for a thousand of them.
        let [_, internal] = sidecars(bucket, key);
        if let Ok(text) = std::fs::read(self.root.join(internal))
            && let Ok(Internal { e_tag }) = serde_json::from_slice(&text)
        {
            return Ok(Some(ETag::Strong(e_tag)));
        }
        // Put there by hand: hashed.
        let input = HeadObjectInput { bucket: bucket.to_owned(), key: key.to_owned(), ..Default::default() };
        let response = self.files.head_object(request(input)).await?;
        Ok(response.output.e_tag)
    }

    /// Compares a write's conditions with the object as it is. The caller holds the lock.
    async fn check(&self, bucket: &str, key: &str, conditions: &Conditions) -> S3Result<()> {
        let Conditions { if_match, if_none_match } = conditions;
        if if_match.is_none() && if_none_match.is_none() || self.control.ignores_conditions() {
            return Ok(());
        }
        if self.control.always_412() {
            return Err(s3_error!(PreconditionFailed, "the control file says so"));
        }
        let current = self.etag(bucket, key).await?;
        let holds = match (if_match, &current) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(ETagCondition::Any), Some(_)) => true,
            (Some(ETagCondition::ETag(wanted)), Some(etag)) => wanted.strong_cmp(etag),
        };
        let holds = holds
            && match if_none_match {
                None => true,
                Some(ETagCondition::Any) => current.is_none(),
                // S3 has no such write either.
                Some(ETagCondition::ETag(_)) => {
                    return Err(s3_error!(NotImplemented, "If-None-Match of a write must be *"));
                }
            };
        if holds {
            return Ok(());
        }
        Err(s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold"))
    }
}

/// What a write demands of the object it replaces.
struct Conditions {
    if_match: Option<ETagCondition>,
    if_none_match: Option<ETagCondition>,
}

/// What `s3s-fs` notes about an object, as far as it is read here.
#[derive(serde::Deserialize)]
struct Internal {
    e_tag: String,
}

/// The names, below the root, of the files in which `s3s-fs` keeps an object's attributes and its ETag.
fn sidecars(bucket: &str, key: &str) -> [String; 2] {
    let encode = |name: &str| base64_simd::URL_SAFE_NO_PAD.encode_to_string(name);
    let stem = format!(".bucket-{}.object-{}", encode(bucket), encode(key));
    [format!("{stem}.metadata.json"), format!("{stem}.internal.json")]
}

/// A request of our own to `s3s-fs`, which looks at the input alone.
fn request<T>(input: T) -> S3Request<T> {
    S3Request {
        input,
        method: Method::GET,
        uri: Uri::default(),
        headers: HeaderMap::default(),
        extensions: Extensions::default(),
        credentials: None,
        region: None,
        service: None,
        trailing_headers: None,
    }
}

/// Gives a body that could not be read to its end the code that S3 would; `s3s-fs` calls all of them
/// internal errors, and their type is private to `s3s`.
fn blame_body(error: S3Error) -> S3Error {
    let Some(source) = error.source().map(ToString::to_string) else {
        return error;
    };
    if source.contains("Sha256Mismatch") {
        let code = S3ErrorCode::Custom("XAmzContentSHA256Mismatch".into());
        let mut error = S3Error::with_message(code, "the body is not what was signed");
        error.set_status_code(StatusCode::BAD_REQUEST);
        error
    } else if source.contains("SignatureMismatch") {
        s3_error!(SignatureDoesNotMatch, "a chunk is not what was signed")
    } else if source.contains("StreamError") {
        s3_error!(IncompleteBody, "{source}")
    } else {
        error
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn get_object(
        &self,
        mut request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let _guard = self.lock.read().await;
        let path = self.existing_path(&request.input.bucket, &request.input.key)?;
        let mut file = tokio::fs::File::open(&path).await.map_err(S3Error::internal_error)?;
        let length = file.metadata().await.map_err(S3Error::internal_error)?.len();

        let range = match request.input.range {
            None => 0..length,
            // No suffix of nothing exists; s3s would compute with its last byte.
            Some(_) if length == 0 => return Err(s3_error!(InvalidRange)),
            Some(range) => range.check(length)?,
        };
        // Always in this form: a suffix longer than the file makes s3s-fs seek before its start.
        if request.input.range.is_some() {
            request.input.range = Some(Range::Int { first: range.start, last: Some(range.end - 1) });
        }
        let mut response = self.files.get_object(request).await?;
        file.seek(io::SeekFrom::Start(range.start)).await.map_err(S3Error::internal_error)?;
        let bytes = file.take(range.end - range.start);
        let stream = ReaderStream::with_capacity(bytes, READ_SIZE);
        response.output.body = Some(StreamingBlob::wrap(stream));
        Ok(response)
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let _guard = self.lock.read().await;
        self.existing_path(&request.input.bucket, &request.input.key)?;
        self.files.head_object(request).await
    }

    async fn put_object(
        &self,
        mut request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let staged = self.staging_key();
        let bucket = std::mem::replace(&mut request.input.bucket, STAGING.to_owned());
        let key = std::mem::replace(&mut request.input.key, staged.clone());
        let conditions = Conditions {
            if_match: request.input.if_match.take(),
            if_none_match: request.input.if_none_match.take(),
        };
        // Before the body: a wrong name is told at once.
        self.object_path(&bucket, &key)?;

        let result = async {
            let response = self.files.put_object(request).await.map_err(blame_body)?;
            let _guard = self.lock.write().await;
            self.check(&bucket, &key, &conditions).await?;
            self.commit(&staged, &bucket, &key)?;
            Ok(response)
        }
        .await;
        if result.is_err() {
            self.discard(&staged);
        }
        result
    }

    async fn copy_object(
        &self,
        mut request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let staged = self.staging_key();
        let bucket = std::mem::replace(&mut request.input.bucket, STAGING.to_owned());
        let key = std::mem::replace(&mut request.input.key, staged.clone());
        self.object_path(&bucket, &key)?;
        if let CopySource::Bucket { bucket, key, .. } = &request.input.copy_source {
            self.existing_path(bucket, key)?;
        }
        let result = async {
            let _guard = self.lock.write().await;
            let response = self.files.copy_object(request).await?;
            self.commit(&staged, &bucket, &key)?;
            Ok(response)
        }
        .await;
        if result.is_err() {
            self.discard(&staged);
        }
        result
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let _guard = self.lock.write().await;
        self.delete(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let DeleteObjectsInput { bucket, delete, .. } = request.input;
        let _guard = self.lock.write().await;
        let mut deleted = Vec::new();
        for object in delete.objects {
            self.delete(&bucket, &object.key)?;
            deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
        }
        let quiet = delete.quiet.unwrap_or(false);
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            ..Default::default()
        }))
    }

    async fn list_objects(
        &self,
        request: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let marker = request.input.marker.clone();
        let response = self.list_objects_v2(request.map_input(Into::into)).await?;
        Ok(response.map_output(|v2| ListObjectsOutput {
            name: v2.name,
            prefix: v2.prefix,
            delimiter: v2.delimiter,
            marker,
            max_keys: v2.max_keys,
            is_truncated: v2.is_truncated,
            next_marker: v2.next_continuation_token,
            contents: v2.contents,
            common_prefixes: v2.common_prefixes,
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        mut request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = &mut request.input;
        let bucket = input.bucket.clone();
        input.max_keys = Some(input.max_keys.unwrap_or(MAX_KEYS).min(MAX_KEYS));
        // s3s-fs would say that the keys are encoded, and not encode them.
        input.encoding_type = None;

        let _guard = self.lock.read().await;
        let mut response = self.files.list_objects_v2(request).await?;
        for object in response.output.contents.iter_mut().flatten() {
            if let Some(key) = &object.key {
                object.e_tag = self.etag(&bucket, key).await?;
            }
        }
        Ok(response)
    }

    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let _guard = self.lock.write().await;
        self.files.create_bucket(request).await
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.files.head_bucket(request).await
    }

    async fn get_bucket_location(
        &self,
        request: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.files.get_bucket_location(request).await
    }

    async fn list_buckets(
        &self,
        request: S3Request<ListBucketsInput>,
    ) -> S3Result<S3Response<ListBucketsOutput>> {
        self.files.list_buckets(request).await
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.object_path(&request.input.bucket, &request.input.key)?;
        self.files.create_multipart_upload(request).await
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        self.object_path(&request.input.bucket, &request.input.key)?;
        self.files.upload_part(request).await.map_err(blame_body)
    }

    async fn complete_multipart_upload(
        &self,
        mut request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let (bucket, key) = (request.input.bucket.clone(), request.input.key.clone());
        let conditions = Conditions {
            if_match: request.input.if_match.take(),
            if_none_match: request.input.if_none_match.take(),
        };
        self.object_path(&bucket, &key)?;
        let _guard = self.lock.write().await;
        self.check(&bucket, &key, &conditions).await?;
        self.files.complete_multipart_upload(request).await
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.object_path(&request.input.bucket, &request.input.key)?;
        self.files.abort_multipart_upload(request).await
    }
}

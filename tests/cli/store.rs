//! The stores as everything above relies on them: against a real S3 server over loopback, and a real
//! directory.

mod common;

use common::{BUCKET, DEVELOPER, HOST, KEY, S3Server, SECRET};
use omni_deploy::store::dir::DirStore;
use omni_deploy::store::s3::{MAX_SINGLE_PUT, S3Store};
use omni_deploy::store::{Condition, Etag, GetResult, Opened, Store, StoreError, StoreUrl, Upload, probe};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const LIMIT: u64 = 1 << 20;

fn open_as(url: &str, key: &str, secret: &str) -> S3Store {
    let StoreUrl::S3(location) = StoreUrl::parse(url).unwrap() else { panic!("{url} is not s3") };
    let (key, secret) = (key.to_string(), secret.to_string());
    let env = move |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some(key.clone()).filter(|k| !k.is_empty()),
        "AWS_SECRET_ACCESS_KEY" => Some(secret.clone()).filter(|s| !s.is_empty()),
        "AWS_EC2_METADATA_DISABLED" => Some("true".into()),
        "HOME" => Some("/nonexistent".into()),
        _ => None,
    };
    S3Store::open_in(&location, Arc::new(env)).unwrap()
}

fn open(url: &str) -> S3Store {
    open_as(url, KEY, SECRET)
}

fn found(store: &dyn Store, key: &str) -> (Vec<u8>, Etag) {
    match store.get(key, None, LIMIT).unwrap() {
        GetResult::Found { bytes, etag } => (bytes, etag),
        other => panic!("{key}: {other:?}"),
    }
}

/// What both stores promise.
fn keeps_the_contract(store: &dyn Store) {
    let key = "manifest.json";
    assert_eq!(store.get(key, None, LIMIT), Ok(GetResult::Missing));
    assert_eq!((store.get_start(key, 4), store.size(key), store.delete(key)), (Ok(None), Ok(None), Ok(())));
    assert_eq!(store.list(""), Ok(vec![]));
    let changed = |result: Result<Etag, StoreError>| {
        assert!(matches!(result, Err(StoreError::Changed(_))), "{result:?}");
    };
    changed(store.put(key, b"no", &Condition::IfMatch(Etag("\"0123456789abcdef0123456789abcdef\"".into()))));
    let one = store.put(key, b"one", &Condition::IfAbsent).unwrap();
    changed(store.put(key, b"no", &Condition::IfAbsent));
    assert_eq!(found(store, key), (b"one".to_vec(), one.clone()));
    assert_eq!(store.get(key, Some(&one), LIMIT), Ok(GetResult::NotModified));
    let two = store.put(key, b"two", &Condition::IfMatch(one.clone())).unwrap();
    assert_ne!(one, two);
    changed(store.put(key, b"no", &Condition::IfMatch(one.clone())));
    assert_eq!(store.get(key, Some(&one), LIMIT), Ok(GetResult::Found { bytes: b"two".to_vec(), etag: two }));
    store.put("hosts/a b+c&ü%.json", b"0123456789", &Condition::Always).unwrap();
    store.put("hosts/empty", b"", &Condition::Always).unwrap();
    assert_eq!(store.list("hosts/").unwrap(), ["hosts/a b+c&ü%.json", "hosts/empty"]);
    assert_eq!(store.size("hosts/a b+c&ü%.json"), Ok(Some(10)));
    assert_eq!(store.get_start("hosts/a b+c&ü%.json", 4), Ok(Some(b"0123".to_vec())));
    assert_eq!(store.get_start("hosts/a b+c&ü%.json", 40), Ok(Some(b"0123456789".to_vec())));
    assert_eq!(store.get_start("hosts/empty", 4), Ok(Some(vec![])));
    assert_eq!(found(store, "hosts/empty").0, b"");
    assert!(matches!(store.get("hosts/a b+c&ü%.json", None, 9), Err(StoreError::TooLarge(_))));
    assert!(matches!(store.get("hosts/a b+c&ü%.json", None, 10), Ok(GetResult::Found { .. })));
    let probed = probe(store).unwrap();
    assert!(probed.conditions.is_ok() && probed.leftover.is_none(), "{probed:?}");
    store.delete("hosts/empty").unwrap();
    assert_eq!(store.list("").unwrap(), ["hosts/a b+c&ü%.json", key]);
}

#[test]
fn a_bucket_and_a_directory_keep_the_same_contract() {
    let server = S3Server::start();
    keeps_the_contract(&open(&server.url("")));
    keeps_the_contract(&open(&server.url("some/prefix")));
    let dir = tempfile::tempdir().unwrap();
    keeps_the_contract(&DirStore::new(&dir.path().join("store")));
}

/// Adds one to the number in the store, as every writer of the manifest does.
fn count_up(store: &dyn Store) {
    loop {
        let (text, etag) = found(store, "count");
        let number: u32 = String::from_utf8(text).unwrap().parse().unwrap();
        match store.put("count", (number + 1).to_string().as_bytes(), &Condition::IfMatch(etag)) {
            Ok(_) => return,
            Err(StoreError::Changed(_)) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

fn loses_nothing(open: impl Fn() -> Box<dyn Store> + Sync) {
    open().put("count", b"0", &Condition::IfAbsent).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let store = open();
                (0..25).for_each(|_| count_up(&*store));
            });
        }
    });
    assert_eq!(found(&*open(), "count").0, b"200");
}

#[test]
fn eight_writers_to_a_bucket_lose_no_update() {
    let server = S3Server::start();
    loses_nothing(|| Box::new(open(&server.url(""))));
}

#[test]
fn eight_writers_to_a_directory_lose_no_update() {
    let dir = tempfile::tempdir().unwrap();
    loses_nothing(|| Box::new(DirStore::new(dir.path())));
}

#[test]
fn threads_share_one_store() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..10 {
                    let key = format!("t/{thread}/{n}");
                    store.put(&key, key.as_bytes(), &Condition::IfAbsent).unwrap();
                    assert_eq!(found(store, &key).0, key.as_bytes());
                }
            });
        }
    });
    assert_eq!(store.list("t/").unwrap().len(), 80);
}

#[test]
fn a_listing_follows_every_page() {
    let server = S3Server::start();
    let store = open(&server.url("p"));
    let mut keys: Vec<String> = (0..2345).map(|n| format!("manifests/{n}")).collect();
    std::thread::scope(|scope| {
        for part in keys.chunks(300) {
            let store = &store;
            scope.spawn(move || {
                part.iter().for_each(|k| drop(store.put(k, b"x", &Condition::Always).unwrap()))
            });
        }
    });
    keys.sort();
    assert_eq!(store.list("manifests/").unwrap(), keys);
    let pages = server.log().iter().filter(|l| l.starts_with("GET /box") && !l.contains("/box/p/")).count();
    assert!(pages >= 3, "{pages}");
}

#[test]
fn an_unchanged_object_costs_one_request() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    let etag = store.put("manifest.json", b"{}", &Condition::IfAbsent).unwrap();
    let before = server.log().len();
    assert_eq!(store.get("manifest.json", Some(&etag), LIMIT), Ok(GetResult::NotModified));
    assert_eq!(server.log()[before..], ["GET /box/manifest.json 304"]);
}

#[test]
fn a_store_that_is_overloaded_for_a_moment_is_waited_for() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    for code in ["SlowDown", "InternalError"] {
        server.faults(&format!(r#"{{"fail": {{"status": 503, "code": "{code}", "count": 5}}}}"#));
        store.put("k", code.as_bytes(), &Condition::Always).unwrap();
        server.faults(&format!(r#"{{"fail": {{"status": 500, "code": "{code}", "count": 5}}}}"#));
        assert_eq!(found(&store, "k").0, code.as_bytes());
        server.faults(&format!(r#"{{"fail": {{"status": 503, "code": "{code}", "count": 5}}}}"#));
        assert_eq!(store.list("").unwrap(), ["k"]);
    }
}

#[test]
fn a_store_that_stays_overloaded_is_given_up_in_bounded_time() {
    let server = S3Server::start();
    server.faults(r#"{"fail": {"status": 503, "code": "SlowDown"}}"#);
    let store = open(&server.url(""));
    let started = Instant::now();
    let error = store.get("manifest.json", None, LIMIT).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(35), "{:?}", started.elapsed());
    assert!(
        matches!(&error, StoreError::Unreachable(t) if t.contains("503 SlowDown") && t.contains("tries"))
    );
    one_line(&error, &["manifest.json", "try again later"]);
    assert!((6..=10).contains(&server.log().len()), "{}", server.log().len());
}

#[test]
fn a_cut_connection_is_tried_again_and_a_lost_answer_looks_like_somebody_elses_write() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    server.faults(r#"{"reset": {"count": 3}}"#);
    let one = store.put("k", b"one", &Condition::IfAbsent).unwrap();
    server.faults(r#"{"reset": {"count": 3}}"#);
    assert_eq!(found(&store, "k").0, b"one");
    // The write happens, its answer is lost, and its repetition finds the new version.
    server.faults(r#"{"reset": {"count": 1, "after": true}}"#);
    assert!(matches!(store.put("k", b"two", &Condition::IfMatch(one)), Err(StoreError::Changed(_))));
    assert_eq!(found(&store, "k").0, b"two");
}

#[test]
fn an_object_that_comes_in_part_is_never_taken_for_the_whole() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    let bytes = pattern(300_000);
    store.put("k", &bytes, &Condition::Always).unwrap();
    server.faults(r#"{"cut": {"bytes": 200000, "count": 2}}"#);
    assert!(found(&store, "k").0 == bytes);
    server.faults(r#"{"cut": {"bytes": 200000}}"#);
    let Opened::Found(mut stream) = store.read_from("k", 0, None).unwrap() else { panic!("it is there") };
    assert!(stream.body.read_to_end(&mut Vec::new()).is_err());
    server.faults(r#"{"cut": {"bytes": 100}}"#);
    let error = store.list("").unwrap_err();
    assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
    one_line(&error, &["cut", "try again"]);
}

fn one_line(error: &StoreError, parts: &[&str]) {
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.contains(SECRET), "{text}");
    assert!(text.contains("; "), "no next move: {text}");
    assert!(parts.iter().all(|p| text.contains(p)), "{parts:?} in: {text}");
}

#[test]
fn every_mistake_is_one_line_with_its_remedy_and_is_not_tried_again() {
    let server = S3Server::start();
    let url = server.url("");
    open(&url).put("k", b"x", &Condition::Always).unwrap();
    let elsewhere = url.replace("//box", "//other-box");
    let before = server.log().len();
    for (store, parts) in [
        (open_as(&url, KEY, "wrong"), &["secret key", KEY, "correct AWS_ACCESS_KEY_ID"][..]),
        (open_as(&url, "AKNOBODY", "x"), &["does not know the access key AKNOBODY", "correct"]),
        (open_as(&url, "", ""), &["no credentials", "AWS_ACCESS_KEY_ID is not set", "/nonexistent/.aws"]),
        (open(&elsewhere), &["no bucket 'other-box'", "create it", &server.address]),
    ] {
        for error in [
            store.get("k", None, LIMIT).unwrap_err(),
            store.get("k", Some(&Etag("\"x\"".into())), LIMIT).unwrap_err(),
            store.get_start("k", 1).unwrap_err(),
            store.put("k", b"y", &Condition::Always).unwrap_err(),
            store.put("k", b"y", &Condition::IfAbsent).unwrap_err(),
            store.put("k", b"y", &Condition::IfMatch(Etag("\"x\"".into()))).unwrap_err(),
            store.list("k").unwrap_err(),
            store.delete("k").unwrap_err(),
            store.read_from("k", 0, None).err().unwrap(),
            write(&store, "k", b"y").unwrap_err(),
        ] {
            assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
            one_line(&error, parts);
        }
    }
    // Ten operations of each of the three stores that had credentials, and no more.
    assert_eq!(server.log().len() - before, 30);
    let head = open_as(&url, KEY, "wrong").size("k").unwrap_err();
    one_line(&head, &["secret key"]);
    assert_eq!(found(&open(&url), "k").0, b"x");
}

/// What the policies of contrib/s3 allow each of them to do with every kind of object, and how the rest is refused.
#[test]
fn a_key_may_do_what_its_policy_says_and_hears_what_is_missing_of_the_rest() {
    let hash = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd";
    let (info, nar) = (format!("{hash}.narinfo"), format!("nar/{hash}.nar.zst"));
    for prefix in ["", "team"] {
        let server = S3Server::start_below(prefix);
        let url = server.url(prefix);
        let slash = if prefix.is_empty() { "" } else { "/" };
        let arn = |key: &str| format!("arn:aws:s3:::{BUCKET}/{prefix}{slash}{key}");
        for (key, developer, host) in [
            ("manifest.json", "rw", "r"),
            ("manifests/manifest-20261122T183105Z-00000001.json", "rw", ""),
            ("hosts/biz.json", "r", "rw"),
            ("hosts/web1.json", "r", ""),
            ("nix-cache-info", "rw", "r"),
            (&info, "rw", "r"),
            (&nar, "rw", "r"),
            ("probe/0123456789abcdef", "rwd", ""),
            ("elsewhere", "", ""),
            ("hosts/biz.json.more", "r", ""),
        ] {
            for ((id, secret), allowed) in [(DEVELOPER, developer), (HOST, host)] {
                open(&url).put(key, b"before", &Condition::Always).unwrap();
                let store = open_as(&url, id, secret);
                let what = format!("{id} {key}");
                let check = |right: char, done: Result<(), StoreError>| match (allowed.contains(right), done)
                {
                    (true, done) => assert_eq!(done, Ok(()), "{what}"),
                    (false, Ok(())) => panic!("{what}: '{right}' was done"),
                    (false, Err(error)) => {
                        assert!(matches!(error, StoreError::Denied(_)), "{what}: {error}");
                        let action = match right {
                            'r' => "s3:GetObject",
                            'w' => "s3:PutObject",
                            _ => "s3:DeleteObject",
                        };
                        one_line(&error, &[key, id, &format!("allow {action} on {}", arn(key))]);
                    }
                };
                check('r', store.get(key, None, LIMIT).map(drop));
                check('r', store.size(key).map(drop));
                check('w', store.put(key, b"after", &Condition::Always).map(drop));
                check('w', write(&store, key, b"after"));
                let (_, etag) = found(&open(&url), key);
                if allowed.contains('r') {
                    check('w', store.put(key, b"after", &Condition::IfMatch(etag)).map(drop));
                }
                let content: &[u8] = if allowed.contains('w') { b"after" } else { b"before" };
                assert_eq!(found(&open(&url), key).0, content, "{what}");
                check('d', store.delete(key));
            }
        }
        // Nothing of another prefix of the bucket, or of none.
        for (id, secret) in [DEVELOPER, HOST] {
            let store = open_as(&url, id, secret);
            assert!(store.list("hosts/").is_ok());
            assert_eq!(
                store.get(&format!("{}.narinfo", "1".repeat(32)), None, LIMIT),
                Ok(GetResult::Missing)
            );
            let elsewhere = open_as(&server.url("other"), id, secret);
            for key in ["manifest.json", "hosts/biz.json"] {
                let error = elsewhere.put(key, b"x", &Condition::Always).unwrap_err();
                one_line(&error, &[&format!("allow s3:PutObject on arn:aws:s3:::{BUCKET}/other/{key}")]);
            }
        }
    }
}

#[test]
fn garbage_is_recognized_whatever_was_asked() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    server.faults(r#"{"garbage": true}"#);
    for error in [
        store.get("k", None, LIMIT).unwrap_err(),
        store.get_start("k", 1).unwrap_err(),
        store.size("k").unwrap_err(),
        store.put("k", b"y", &Condition::Always).unwrap_err(),
        store.put("k", b"y", &Condition::IfAbsent).unwrap_err(),
        store.list("").unwrap_err(),
        store.delete("k").unwrap_err(),
        store.read_from("k", 0, None).err().unwrap(),
    ] {
        assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
        one_line(&error, &["which is not S3", "check the store's endpoint"]);
    }
}

/// A server that gives every connection the same answer.
fn canned(answer: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("s3://box?endpoint={}&scheme=http", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let mut head = Vec::new();
            let mut buffer = [0; 4096];
            while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                match socket.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => head.extend_from_slice(&buffer[..n]),
                }
            }
            drop(socket.write_all(answer.as_bytes()));
        }
    });
    url
}

#[test]
fn answers_that_would_confuse_an_xml_reader_end_in_an_error() {
    let listing =
        "<ListBucketResult><IsTruncated>maybe</IsTruncated><MaxKeys>many</MaxKeys><Contents><Key>a</Key>";
    for (status, body) in [
        ("200 OK", "<html><body><h1>Hi & bye<br></body></html>"),
        ("200 OK", listing),
        ("200 OK", "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"),
        ("200 OK", "<a><b></a></b>"),
        ("200 OK", ""),
        ("200 OK", "\u{0}\u{1}"),
        ("404 Not Found", "<Error><Code>NoSuchKey"),
        ("404 Not Found", "<html>"),
        ("403 Forbidden", "<Error><Code>"),
    ] {
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nx-amz-missing-meta: x\r\n\
             x-amz-delete-marker: x\r\nConnection: close\r\n\r\n{body}"
        );
        let store = open(&canned(answer));
        one_line(&store.list("").unwrap_err(), &[]);
        one_line(&store.get("k", None, LIMIT).unwrap_err(), &["k"]);
    }
    let store = open(&canned("220 mail.example.com ESMTP\r\n".into()));
    one_line(&store.get("k", None, LIMIT).unwrap_err(), &["not HTTP", "endpoint"]);
}

#[test]
fn a_skewed_clock_is_measured_by_the_stores_own() {
    let body =
        "<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>";
    let answer = format!(
        "HTTP/1.1 403 Forbidden\r\nDate: Tue, 01 Jan 2019 00:00:00 GMT\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    let error = open(&canned(answer)).get("manifest.json", None, LIMIT).unwrap_err();
    one_line(&error, &["manifest.json", "d ahead of the store's", "timedatectl set-ntp true"]);
}

#[test]
fn a_body_without_end_is_not_read_past_the_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("s3://box?endpoint={}&scheme=http", listener.local_addr().unwrap());
    let sender = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        assert_ne!(socket.read(&mut [0; 4096]).unwrap(), 0);
        let head = "HTTP/1.1 200 OK\r\nETag: \"x\"\r\nTransfer-Encoding: chunked\r\n\r\n";
        socket.write_all(head.as_bytes()).unwrap();
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        let mut sent = 0u64;
        while socket.write_all(chunk.as_bytes()).is_ok() {
            sent += 0x10000;
        }
        sent
    });
    let error = open(&url).get("k", None, 1000).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge(_)), "{error:?}");
    // The buffers of two sockets, and nothing like all of it.
    assert!(sender.join().unwrap() < 64 << 20);
}

#[test]
fn nobody_there_and_no_such_name_are_told_apart_and_given_up_soon() {
    for (endpoint, parts) in [
        // A port that the kernel gives to nobody.
        ("127.0.0.1:1", ["connection refused", "start the store"]),
        ("no-such-host.invalid:9000", ["does not resolve", "check the store's endpoint"]),
    ] {
        let started = Instant::now();
        let store = open(&format!("s3://box?endpoint={endpoint}&scheme=http"));
        let error = store.get("manifest.json", None, LIMIT).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
        one_line(&error, &parts);
        one_line(&error, &["manifest.json", endpoint]);
        assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    }
}

#[test]
fn a_store_that_ignores_or_refuses_conditions_is_found_out() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    server.faults(r#"{"ignore_conditions": true}"#);
    let complaint = probe(&store).unwrap().conditions.unwrap_err();
    assert!(complaint.contains("ignores If-None-Match") && complaint.contains("; use"), "{complaint}");
    server.faults(r#"{"always_412": true}"#);
    let complaint = probe(&store).unwrap().conditions.unwrap_err();
    assert!(complaint.contains("rejects conditional writes"), "{complaint}");
    server.faults("{}");
    probe(&store).unwrap().conditions.unwrap();
    // A conflict for a moment is neither.
    server.faults(r#"{"fail": {"status": 409, "code": "ConditionalRequestConflict", "count": 1}}"#);
    probe(&store).unwrap().conditions.unwrap();
    assert_eq!(store.list("").unwrap(), Vec::<String>::new(), "the probes' own objects are gone");
}

/// Bytes that are not the same everywhere.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 31 + n / 997) as u8).collect()
}

#[test]
fn streams_go_both_ways_whole() {
    let server = S3Server::start();
    let store = open(&server.url("cache"));
    assert_eq!(store.size("nar/x"), Ok(None));
    for length in [0, 1, 100_000, 200_000, 9_000_000] {
        let bytes = pattern(length);
        // What comes after the promised bytes is not taken.
        let open = || -> std::io::Result<Content> {
            Ok(Box::new(std::io::Cursor::new(pattern(length)).chain(&b"rest"[..])))
        };
        let upload = Upload { length: length as u64, content_type: "application/x-nix-nar", open: &open };
        store.write_from("nar/x", &upload).unwrap();
        assert_eq!(store.size("nar/x"), Ok(Some(length as u64)));
        assert!(rest(&store, "nar/x", 0, None).0 == bytes, "{length} bytes differ");
    }
}

#[test]
fn an_object_is_written_with_its_media_type() {
    for length in [10, 200_000, 3_000_000] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = open(&format!("s3://box?endpoint={}&scheme=http", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let mut reader = BufReader::new(listener.accept().unwrap().0);
            let mut head = String::new();
            while reader.read_line(&mut head).unwrap() > 2 {}
            if head.contains("100-continue") {
                reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            }
            std::io::copy(&mut (&mut reader).take(length as u64), &mut std::io::sink()).unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nETag: \"x\"\r\nContent-Length: 0\r\n\r\n";
            reader.get_mut().write_all(answer).unwrap();
            head
        });
        write(&store, "nar/x", &pattern(length)).unwrap();
        let head = server.join().unwrap().to_lowercase();
        assert!(head.contains("\r\ncontent-type: application/x-nix-nar\r\n"), "{head}");
    }
}

/// A server that others have written, which tests/lab/vendors.sh starts: OMNI_TEST_STORE is its URL, and the
/// credentials are those of the environment.
#[cfg(feature = "vendors")]
#[test]
#[ignore = "needs a server of another vendor: tests/lab/vendors.sh"]
fn a_store_of_another_vendor_keeps_the_contract() {
    let url = std::env::var("OMNI_TEST_STORE").unwrap();
    let var = |name: &str| std::env::var(name).unwrap();
    let below = |prefix: &str| {
        let (bucket, query) = url.split_once('?').unwrap();
        let url = format!("{bucket}/{prefix}?{query}");
        open_as(&url, &var("AWS_ACCESS_KEY_ID"), &var("AWS_SECRET_ACCESS_KEY"))
    };
    let store = below("contract");
    // Finds out in which form it takes versions.
    probe(&store).unwrap().conditions.unwrap();
    keeps_the_contract(&store);
    assert!(matches!(
        store.put("missing", b"no", &Condition::IfMatch(Etag("\"0123456789abcdef0123456789abcdef\"".into()))),
        Err(StoreError::Changed(_))
    ));
    let store = below("writers");
    store.put("count", b"0", &Condition::IfAbsent).unwrap();
    probe(&store).unwrap().conditions.unwrap();
    std::thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(|| (0..5).for_each(|_| count_up(&store)))));
    });
    assert_eq!(found(&store, "count").0, b"40");
    // As a push and a fetch do: many at once, read again from where they were cut.
    let store = below("cache");
    let sizes: Vec<usize> = (0..64).map(|n| [0, 500, 200_000, 3_000_000][n % 4] + n / 4).collect();
    let moved = omni_deploy::parallel::map(&sizes, 16, |size| {
        let key = format!("nar/{size}");
        let bytes: &[u8] = &pattern(*size);
        write(&store, &key, bytes).unwrap();
        let (all, etag) = rest(&store, &key, 0, None);
        let half = size / 2;
        all == bytes && (half == 0 || rest(&store, &key, half as u64, Some(&etag)).0 == bytes[half..])
    });
    assert!(moved.into_iter().all(|well| well));
    let Opened::Found(download) = store.read_from("nar/3000000", 0, None).unwrap() else { panic!("gone") };
    write(&store, "nar/3000000", b"another").unwrap();
    assert!(matches!(store.read_from("nar/3000000", 3, Some(&download.etag)), Ok(Opened::Changed)));
    assert!(matches!(store.read_from("nar/3000000", 7, None), Ok(Opened::Changed)));
    let keys = store.list("nar/").unwrap();
    assert_eq!(keys.len(), 64);
    let after = store.list_after("nar/", &keys[40]).unwrap();
    assert_eq!((after.keys, after.more), (keys[41..].to_vec(), false));
}

type Content = Box<dyn Read + Send>;

fn write(store: &dyn Store, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let open = || -> std::io::Result<Content> { Ok(Box::new(std::io::Cursor::new(bytes.to_vec()))) };
    let kind = "application/x-nix-nar";
    store.write_from(key, &Upload { length: bytes.len() as u64, content_type: kind, open: &open })
}

/// What comes from an offset on, with the version.
fn rest(store: &dyn Store, key: &str, offset: u64, only: Option<&Etag>) -> (Vec<u8>, Etag) {
    let Opened::Found(mut download) = store.read_from(key, offset, only).unwrap() else {
        panic!("{key} from {offset} is not there")
    };
    let mut bytes = Vec::new();
    download.body.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, download.length);
    (bytes, download.etag)
}

#[test]
fn a_read_goes_on_where_it_was_cut_unless_the_object_is_another_now() {
    let server = S3Server::start();
    let store = open(&server.url("cache"));
    assert!(matches!(store.read_from("nar/x", 0, None), Ok(Opened::Missing)));
    let bytes: &[u8] = &pattern(3_000_000);
    write(&store, "nar/x", bytes).unwrap();
    server.faults(r#"{"cut": {"bytes": 1000000, "count": 1}}"#);
    let Ok(Opened::Found(mut cut)) = store.read_from("nar/x", 0, None) else { panic!("nothing there") };
    assert_eq!(cut.length, 3_000_000);
    let mut got = Vec::new();
    cut.body.read_to_end(&mut got).unwrap_err();
    assert!(!got.is_empty() && got.len() <= 1_000_000, "{}", got.len());
    got.extend(rest(&store, "nar/x", got.len() as u64, Some(&cut.etag)).0);
    assert!(got == bytes, "the two parts are not the whole");
    assert!(matches!(store.read_from("nar/x", 3_000_000, None), Ok(Opened::Changed)));
    write(&store, "nar/x", &pattern(2_000_000)).unwrap();
    assert!(matches!(store.read_from("nar/x", 1_000_000, Some(&cut.etag)), Ok(Opened::Changed)));
    assert!(matches!(store.read_from("nar/x", 2_500_000, Some(&cut.etag)), Ok(Opened::Changed)));
    write(&store, "empty", b"").unwrap();
    assert_eq!(rest(&store, "empty", 0, None).0, b"");
}

struct Unread;

impl Read for Unread {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        panic!("read")
    }
}

#[test]
fn a_write_is_made_again_from_its_beginning() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    for (number, faults) in [
        r#"{"reset": {"count": 2, "after": true}}"#,
        r#"{"fail": {"status": 503, "code": "SlowDown", "count": 3, "methods": ["PUT"]}}"#,
        r#"{"refuse_expect": true}"#,
        r#"{"require_checksum": true}"#,
    ]
    .into_iter()
    .enumerate()
    {
        server.faults(faults);
        for length in [10, 200_000, 3_000_000] {
            let key = format!("nar/{number}-{length}");
            let bytes: &[u8] = &pattern(length);
            write(&store, &key, bytes).unwrap_or_else(|e| panic!("{faults}: {e}"));
            server.faults("{}");
            assert!(rest(&store, &key, 0, None).0 == bytes, "{faults} {length}");
            server.faults(faults);
        }
    }
    server.faults("{}");
    let short = || -> std::io::Result<Content> { Ok(Box::new(std::io::repeat(7).take(199_999))) };
    let error = store
        .write_from("nar/x", &Upload { length: 200_000, content_type: "text/plain", open: &short })
        .unwrap_err();
    one_line(&error, &["nar/x", "1 bytes fewer than promised"]);
    assert_eq!(store.size("nar/x"), Ok(None));
    let none = || -> std::io::Result<Content> { panic!("opened") };
    let upload = Upload { length: MAX_SINGLE_PUT + 1, content_type: "text/plain", open: &none };
    one_line(&store.write_from("nar/x", &upload).unwrap_err(), &["nar/x", "5368709121"]);
    // A large one that is refused is refused before any of it was read.
    let wrong = open_as(&server.url(""), KEY, "wrong");
    let never = || -> std::io::Result<Content> { Ok(Box::new(Unread)) };
    let upload = Upload { length: 5_000_000, content_type: "text/plain", open: &never };
    one_line(&wrong.write_from("nar/x", &upload).unwrap_err(), &["secret key"]);
}

/// Hands on what comes, both ways, until each side has ended.
fn join(client: TcpStream, server: TcpStream) {
    for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
        std::thread::spawn(move || {
            drop(std::io::copy(&mut from, &mut to));
            drop(to.shutdown(std::net::Shutdown::Write));
        });
    }
}

/// Leads connections to a server and counts them.
fn counted(address: &str) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let (counter, address) = (count.clone(), address.to_string());
    std::thread::spawn(move || {
        for client in listener.incoming() {
            counter.fetch_add(1, Ordering::Relaxed);
            let (client, server) = (client.unwrap(), TcpStream::connect(&address).unwrap());
            join(client, server);
        }
    });
    (here, count)
}

#[test]
fn a_connection_is_used_again_after_whatever_was_asked() {
    let server = S3Server::start();
    let (address, connections) = counted(&server.address);
    let store = open(&format!("s3://{BUCKET}?endpoint={address}&scheme=http"));
    for round in 0..20 {
        for length in [0, 10, 300_000, 1_500_000] {
            write(&store, "nar/x", &pattern(length)).unwrap();
            assert_eq!(rest(&store, "nar/x", 0, None).0.len(), length);
            assert_eq!(store.size("nar/x"), Ok(Some(length as u64)));
        }
        let etag = store.put("k", format!("{round}").as_bytes(), &Condition::Always).unwrap();
        assert_eq!(store.get("k", Some(&etag), LIMIT), Ok(GetResult::NotModified));
        assert!(matches!(store.get("k", None, LIMIT), Ok(GetResult::Found { .. })));
        assert!(matches!(store.get("missing", None, LIMIT), Ok(GetResult::Missing)));
        assert!(matches!(store.read_from("missing", 0, None), Ok(Opened::Missing)));
        assert!(matches!(store.put("k", b"no", &Condition::IfAbsent), Err(StoreError::Changed(_))));
        store.list("").unwrap();
        store.delete("k").unwrap();
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[test]
fn no_runtime_is_started() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    store.put("k", b"x", &Condition::Always).unwrap();
    store.list("").unwrap();
    store.delete("nothing").unwrap();
    rest(&store, "k", 0, None);
    let tasks = fs_err::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<fs_err::DirEntry>| {
        // A thread of another test may end meanwhile.
        fs_err::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
    };
    let names: Vec<String> = tasks.map(name).collect();
    assert!(names.iter().all(|n| !n.contains("tokio") && !n.contains("hyper")), "{names:?}");
}

/// S3's own words for "not now": whatever their status is, the request is made again.
#[test]
fn what_the_code_calls_transient_is_tried_again_whatever_the_status() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    for (number, (status, code)) in [
        (409, "OperationAborted"),
        (400, "RequestTimeout"),
        (409, "ConditionalRequestConflict"),
        (409, ""),
        (408, ""),
        (503, ""),
        (500, "SomethingNew"),
    ]
    .into_iter()
    .enumerate()
    {
        let faults = format!(r#"{{"fail": {{"status": {status}, "code": "{code}", "count": 2}}}}"#);
        let key = format!("k{number}");
        server.faults(&faults);
        let etag = store.put(&key, b"one", &Condition::IfAbsent).unwrap();
        server.faults(&faults);
        store.put(&key, b"two", &Condition::IfMatch(etag)).unwrap();
        server.faults(&faults);
        assert_eq!(found(&store, &key).0, b"two", "{status} {code}");
        server.faults(&faults);
        write(&store, &key, &pattern(2 << 20)).unwrap();
    }
}

#[test]
fn a_conflict_that_stays_is_never_taken_for_an_object_that_is_there() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    server.faults(r#"{"fail": {"status": 409, "code": "ConditionalRequestConflict", "methods": ["PUT"]}}"#);
    let error = store.put("manifests/x", b"one", &Condition::IfAbsent).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
    one_line(&error, &["409 ConditionalRequestConflict", "tries", "try again later"]);
    server.faults("{}");
    assert_eq!(store.get("manifests/x", None, LIMIT), Ok(GetResult::Missing));
}

#[test]
fn a_front_that_does_not_know_expect_is_sent_none() {
    let server = S3Server::start();
    let store = open(&server.url(""));
    server.faults(r#"{"refuse_expect": true}"#);
    for key in ["one", "two"] {
        let bytes = pattern(3_000_000);
        write(&store, key, &bytes).unwrap();
        assert!(rest(&store, key, 0, None).0 == bytes, "{key}");
    }
    // Asked once, and remembered.
    let refused: Vec<String> = server.log().into_iter().filter(|l| l.ends_with(" 417")).collect();
    assert_eq!(refused, ["PUT /box/one 417"]);
}

#[test]
fn a_bucket_that_wants_checksums_gets_them_with_small_and_large_objects() {
    let server = S3Server::start();
    server.faults(r#"{"require_checksum": true}"#);
    for large_first in [false, true] {
        let store = open(&server.url(if large_first { "a" } else { "b" }));
        let before = server.log().len();
        let large = || {
            let bytes = pattern(3_000_000);
            write(&store, "nar/x", &bytes).unwrap();
            assert!(rest(&store, "nar/x", 0, None).0 == bytes);
        };
        if large_first {
            large();
        }
        let etag = store.put("manifest.json", b"one", &Condition::IfAbsent).unwrap();
        store.put("manifest.json", b"two", &Condition::IfMatch(etag)).unwrap();
        write(&store, "nix-cache-info", b"hello").unwrap();
        large();
        assert_eq!(found(&store, "manifest.json").0, b"two");
        let refused = server.log()[before..].iter().filter(|l| l.ends_with(" 400")).count();
        assert_eq!(refused, 1, "{:?}", server.log());
        probe(&store).unwrap().conditions.unwrap();
    }
}

/// A proxy for one server: whatever name is asked for, the connection leads there.
fn proxy_to(address: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let address = address.to_string();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, server) = (client.unwrap(), TcpStream::connect(&address).unwrap());
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            assert!(head.starts_with(b"CONNECT "), "{}", String::from_utf8_lossy(&head));
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            join(client, server);
        }
    });
    url
}

#[test]
fn a_store_that_wants_the_bucket_in_the_hosts_name_is_addressed_so() {
    let server = S3Server::start_as("store.test");
    server.faults(r#"{"refuse_path_style": true}"#);
    let proxy = proxy_to(&server.address);
    let open = |style: &str| {
        let url = format!("s3://{BUCKET}/p?endpoint=store.test&scheme=http{style}");
        let StoreUrl::S3(location) = StoreUrl::parse(&url).unwrap() else { panic!("{url} is not s3") };
        let proxy = proxy.clone();
        let env = move |name: &str| match name {
            "AWS_ACCESS_KEY_ID" => Some(KEY.to_string()),
            "AWS_SECRET_ACCESS_KEY" => Some(SECRET.to_string()),
            "http_proxy" => Some(proxy.clone()),
            _ => None,
        };
        S3Store::open_in(&location, Arc::new(env)).unwrap()
    };
    for (style, refused) in [("", 1), ("&addressing-style=auto", 1), ("&addressing-style=virtual", 0)] {
        let before = server.log().len();
        keeps_the_contract(&open(style));
        assert_eq!(open(style).size("missing"), Ok(None));
        let store = open(style);
        assert_eq!(store.size("hosts/a b+c&ü%.json"), Ok(Some(10)));
        write(&store, "nar/x", &pattern(2 << 20)).unwrap();
        let log = server.log();
        // Each of the three asks once; a HEAD has no body with the reason, so that it takes a GET as well.
        let count = log[before..].iter().filter(|l| l.ends_with(" 403")).count();
        assert_eq!(count, refused * 5, "{style}: {:?}", &log[before..]);
        assert!(log[before..].iter().any(|l| l == "PUT /p/nar/x 200"), "{style}");
        store.list("").unwrap().iter().for_each(|key| store.delete(key).unwrap());
    }
    let error = open("&addressing-style=path").get("k", None, LIMIT).unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    one_line(&error, &["SecondLevelDomainForbidden", "take addressing-style=path out of the store's URL"]);
}

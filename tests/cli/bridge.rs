//! The bridge over a real socket, against a real S3 protocol.

mod cache;
mod common;

use cache::{bucket, bucket_as, developers_bucket};
use common::{KEY, S3Server, SECRET};
use omni_deploy::bridge::{Access, Bridge};
use omni_deploy::runner::Run;
use omni_deploy::store::{Got, Store, When};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

fn connect(bridge: &Bridge) -> (TcpStream, String) {
    let url = bridge.url();
    let (address, secret) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    (TcpStream::connect(address).unwrap(), secret.to_string())
}

/// Sends bytes as they are, and reads until the end of the connection.
fn raw(bridge: &Bridge, bytes: &[u8]) -> String {
    let (mut stream, _) = connect(bridge);
    stream.write_all(bytes).unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

fn read_answer(stream: &mut TcpStream, has_body: bool) -> Answer {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "cut: {}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; if has_body { length } else { 0 }];
    stream.read_exact(&mut body).unwrap();
    Answer { status: head[9..12].parse().unwrap(), head, body }
}

/// One request on a connection of its own.
fn request(bridge: &Bridge, method: &str, key: &str, headers: &str, body: &[u8]) -> Answer {
    let (mut stream, secret) = connect(bridge);
    write!(stream, "{method} /{secret}/{key} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").unwrap();
    stream.write_all(body).unwrap();
    read_answer(&mut stream, method != "HEAD")
}

fn stored(s3: &S3Server, key: &str) -> Option<Vec<u8>> {
    match bucket(s3).get(key, None, 1 << 30).unwrap() {
        Got::Found { bytes, .. } => Some(bytes),
        _ => None,
    }
}

#[test]
fn what_is_put_can_be_read_whole_and_in_parts() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let length = format!("Content-Length: {}\r\nContent-Type: application/x-nix-nar\r\n", bytes.len());
    assert_eq!(request(&bridge, "GET", "nar/x.nar", "", b"").status, 404);
    assert_eq!(request(&bridge, "PUT", "nar/x.nar", &length, &bytes).status, 200);
    assert_eq!(stored(&s3, "nar/x.nar").unwrap(), bytes);
    let whole = request(&bridge, "GET", "nar/x.nar", "", b"");
    assert_eq!((whole.status, whole.body == bytes), (200, true));
    assert!(whole.head.contains("Accept-Ranges: bytes"), "{}", whole.head);
    let head = request(&bridge, "HEAD", "nar/x.nar", "", b"");
    assert!(head.status == 200 && head.head.contains("Content-Length: 3000000\r\n"), "{}", head.head);
    for (range, want) in
        [("5-9", &bytes[5..10]), ("2999990-", &bytes[2_999_990..]), ("-3", &bytes[2_999_997..])]
    {
        let part = request(&bridge, "GET", "nar/x.nar", &format!("Range: bytes={range}\r\n"), b"");
        assert_eq!((part.status, part.body.as_slice()), (206, want), "{range}");
        assert!(part.head.contains("Content-Range: bytes "), "{}", part.head);
    }
    assert_eq!(request(&bridge, "GET", "nar/x.nar", "Range: bytes=3000000-\r\n", b"").status, 416);
    assert_eq!(bridge.troubles(), [""; 0]);
}

#[test]
fn chunks_of_unknown_length_arrive_whole() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (mut body, mut want) = (Vec::new(), Vec::new());
    for size in [1usize, 10, 4096, 70_000, 2_000_000] {
        let chunk = vec![size as u8; size];
        body.extend_from_slice(format!("{size:X};ext=1\r\n").as_bytes());
        body.extend_from_slice(&chunk);
        body.extend_from_slice(b"\r\n");
        want.extend_from_slice(&chunk);
    }
    body.extend_from_slice(b"0\r\nTrailer: x\r\n\r\n");
    assert_eq!(request(&bridge, "PUT", "nar/c", "Transfer-Encoding: chunked\r\n", &body).status, 200);
    assert_eq!(stored(&s3, "nar/c").unwrap(), want);
}

#[test]
fn a_connection_carries_one_request_after_another_also_at_once() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (mut stream, secret) = connect(&bridge);
    let mut both = String::new();
    for n in 0..3 {
        both.push_str(&format!("PUT /{secret}/nar/{n} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{n}\n"));
        both.push_str(&format!("GET /{secret}/nar/{n} HTTP/1.1\r\n\r\n"));
    }
    stream.write_all(both.as_bytes()).unwrap();
    for n in 0..3 {
        assert_eq!(read_answer(&mut stream, true).status, 200);
        assert_eq!(read_answer(&mut stream, true).body, format!("{n}\n").as_bytes());
    }
}

#[test]
fn a_client_that_waits_for_continue_is_told_before_it_sends() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (mut stream, secret) = connect(&bridge);
    let head = format!("PUT /{secret}/nar/e HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut go = [0; 25];
    stream.read_exact(&mut go).unwrap();
    assert_eq!(&go, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").unwrap();
    assert_eq!(read_answer(&mut stream, true).status, 200);
    // What is not taken is refused at once, without a hundred.
    let (mut stream, secret) = connect(&bridge);
    let large =
        format!("PUT /{secret}/nar/l HTTP/1.1\r\nContent-Length: 5368709121\r\nExpect: 100-continue\r\n\r\n");
    stream.write_all(large.as_bytes()).unwrap();
    assert_eq!(read_answer(&mut stream, true).status, 413);
    assert!(bridge.troubles()[0].contains("5 GiB"), "{:?}", bridge.troubles());
    assert_eq!(stored(&s3, "nar/l"), None);
}

#[test]
fn whoever_does_not_know_the_path_learns_nothing() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (_, secret) = connect(&bridge);
    assert!(secret.len() >= 32, "{secret}");
    let wrong = secret.replace(|c: char| c.is_ascii_digit(), "f");
    let mut answers: Vec<String> =
        ["/", "/nix-cache-info", "/x/nix-cache-info", &format!("/{wrong}/nix-cache-info")]
            .iter()
            .flat_map(|path| {
                ["GET", "PUT", "DELETE"].map(|method| {
                    raw(&bridge, format!("{method} {path} HTTP/1.1\r\nContent-Length: 0\r\n\r\n").as_bytes())
                })
            })
            .collect();
    answers.dedup();
    assert_eq!(answers, ["HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"]);
    for (bytes, status) in
        [("\x16\x03\x01\r\n\r\n", " 400 "), ("GET / HTTP/1.1\r\nA:b\r\n", ""), (&"a".repeat(20_000), " 431 ")]
    {
        let (mut stream, _) = connect(&bridge);
        stream.write_all(bytes.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains(status) && text.is_empty() == status.is_empty(), "{text}");
    }
    assert_eq!(s3.log(), [""; 0], "nothing of it may reach the bucket");
}

#[test]
fn nothing_but_the_cache_is_within_reach() {
    let s3 = S3Server::start_below("cache");
    bucket(&s3).put("manifest.json", b"{}", &When::Always).unwrap();
    let before = s3.log().len();
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    for key in [
        "manifest.json",
        "../cache/manifest.json",
        "nar/../manifest.json",
        "nar/%2e%2e/manifest.json",
        "nar//x",
    ] {
        for method in ["GET", "HEAD", "PUT"] {
            let answer = request(&bridge, method, key, "Content-Length: 0\r\n", b"");
            assert_eq!(answer.status, 404, "{method} {key}");
        }
    }
    assert_eq!(s3.log().len(), before);
    let reading = Bridge::open(developers_bucket(&s3), Access::Read).unwrap();
    assert_eq!(request(&reading, "PUT", "nar/x", "Content-Length: 1\r\n", b"x").status, 405);
    assert_eq!(s3.log().len(), before);
    assert!(reading.troubles()[0].contains("reading only"));
}

#[test]
fn a_bucket_without_cache_info_can_be_read_and_gets_one_when_written() {
    let s3 = S3Server::start_below("cache");
    let reading = Bridge::open(developers_bucket(&s3), Access::Read).unwrap();
    assert_eq!(request(&reading, "GET", "nix-cache-info", "", b"").body, b"StoreDir: /nix/store\n");
    assert_eq!(request(&reading, "HEAD", "nix-cache-info", "", b"").status, 200);
    let writing = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    assert_eq!(request(&writing, "GET", "nix-cache-info", "", b"").status, 404);
}

#[test]
fn a_refusal_of_the_bucket_is_never_taken_for_a_missing_path() {
    let s3 = S3Server::start_below("cache");
    let info = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd.narinfo";
    let bridge = Bridge::open(bucket_as(&s3, KEY, "wrong"), Access::Write).unwrap();
    for method in ["GET", "HEAD"] {
        assert_eq!(request(&bridge, method, info, "", b"").status, 500, "{method}");
    }
    assert_eq!(request(&bridge, "PUT", "nar/x", "Content-Length: 1\r\n", b"x").status, 500);
    let said = bridge.troubles().join("\n");
    assert!(said.contains("secret"), "{said}");
    let large = vec![0; 3 << 20];
    let length = format!("Content-Length: {}\r\n", large.len());
    assert_eq!(request(&bridge, "PUT", "nar/y", &length, &large).status, 500);
}

#[test]
fn a_transfer_that_breaks_off_is_not_taken_for_whole() {
    let s3 = S3Server::start_below("cache");
    bucket(&s3).put("nar/x", &vec![7; 1 << 20], &When::Always).unwrap();
    let bridge = Bridge::open(developers_bucket(&s3), Access::Read).unwrap();
    s3.faults(r#"{"cut": {"bytes": 1000, "methods": ["GET"], "key_prefix": "cache/nar/"}}"#);
    let (mut stream, secret) = connect(&bridge);
    write!(stream, "GET /{secret}/nar/x HTTP/1.1\r\n\r\n").unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    let head = String::from_utf8_lossy(&text[..200]).into_owned();
    assert!(head.contains("Content-Length: 1048576") && text.len() < 10_000, "{head}");
    assert!(bridge.troubles()[0].contains("broke off"), "{:?}", bridge.troubles());
}

#[test]
fn a_client_that_leaves_in_the_middle_leaves_no_object() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (mut stream, secret) = connect(&bridge);
    write!(stream, "PUT /{secret}/nar/half HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n").unwrap();
    stream.write_all(&vec![1; 2_000_000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!((rest.len(), stored(&s3, "nar/half"), bridge.troubles()), (0, None, Vec::new()));
}

/// As root, to be somebody else for a moment.
#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn another_user_is_not_answered_even_with_the_path() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Read).unwrap();
    let url = format!("{}/nix-cache-info", bridge.url());
    let curl = ["curl", "--silent", "--show-error", "--max-time", "10", &url];
    // Nor is who comes by the other of the kernel's tables.
    let mapped = url.replace("127.0.0.1", "[::ffff:127.0.0.1]");
    for url in [&url, &mapped] {
        let curl = curl.iter().map(|word| if word.starts_with("http") { url.as_str() } else { word });
        let ours = Run::new("env").args(curl.clone()).output().unwrap();
        assert_eq!(ours.text(), "StoreDir: /nix/store\n", "{}", ours.stderr);
        let nobody =
            Run::new("setpriv").args(["--reuid=65534", "--clear-groups"]).args(curl).output().unwrap();
        assert_eq!(nobody.text(), "");
        assert!(nobody.stderr.starts_with("curl: "), "it was curl that failed: {}", nobody.stderr);
    }
}

#[test]
fn the_bridge_ends_with_its_guard() {
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let (mut idle, _) = connect(&bridge);
    let address = idle.peer_addr().unwrap();
    drop(bridge);
    assert!(TcpStream::connect(address).is_err());
    assert!(matches!(idle.read(&mut [0]), Ok(0) | Err(_)));
}

/// The files below /proc of a process that forbids core dumps are root's: who it is must not be read from them.
#[test]
#[ignore = "needs root and Nix: cargo test -- --ignored"]
fn a_user_who_is_not_root_is_answered_by_their_own_bridge() {
    let s3 = S3Server::start();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs_err::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    fs_err::copy(env!("CARGO_BIN_EXE_omni-deploy"), at("omni-deploy")).unwrap();
    let script = "mkdir -p w/bin; echo hi >w/bin/w; chmod +x w/bin/w; path=$(nix-store --add w)
        ./omni-deploy manifest init
        ./omni-deploy manifest add-service \
            '{\"name\": \"w\", \"artifact\": {\"storePath\": \"/nix/store/placeholder\"}, \"hosts\": [\"biz\"]}'
        ./omni-deploy push --service w $path; id -u >who";
    let push = Run::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-euc", script])
        .dir(dir.path())
        .env("HOME", dir.path())
        .env("TMPDIR", dir.path())
        .env("NIX_REMOTE", format!("local?root={}", at("nix").display()))
        .env("NIX_CONFIG", cache::NIX_CONFIG)
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("OMNI_DEPLOY_HOST", "laptop")
        .env("OMNI_DEPLOY_STORE", s3.url("cache"))
        .without_env("XDG_CONFIG_HOME")
        .without_env("XDG_STATE_HOME")
        .success()
        .unwrap();
    assert_eq!(fs_err::read_to_string(at("who")).unwrap(), "65534\n");
    assert!(push.stderr.contains("closure of 1 path"), "{}", push.stderr);
    assert!(s3.log().iter().any(|l| l.starts_with("PUT /box/cache/nar/") && l.ends_with(" 200")));
    // What Nix adds to a store, it makes read-only.
    Run::new("chmod").args(["-R", "u+w"]).arg(at("nix")).success().unwrap();
}

//! The built server, through signed requests over loopback.

mod support;

use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use support::{BUCKET, Request, Server, elements, receive};

// Who is let in

#[test]
fn a_signed_request_is_served() {
    let server = Server::start();
    assert_eq!(server.put("a%20b/c%2Bd.txt", "x").status, 200);
    assert_eq!(server.get("a%20b/c%2Bd.txt").text(), "x");
}

#[test]
fn wrong_credentials_are_told_apart() {
    let server = Server::start();
    let put = || server.request("PUT", "k").body("x");
    let outcome = |request: Request| {
        let response = request.send();
        let (status, code) = response.outcome();
        (status, code.to_owned())
    };
    let refused = |code: &str| (403, code.to_owned());
    assert_eq!(outcome(put().user("root", "guess")), refused("SignatureDoesNotMatch"));
    assert_eq!(outcome(put().user("nobody", "secret")), refused("InvalidAccessKeyId"));
    assert_eq!(outcome(put().anonymous()), refused("AccessDenied"));
    assert_eq!(server.get("k").outcome(), (404, "NoSuchKey"));
}

#[test]
fn a_clock_that_is_off_is_refused() {
    let server = Server::start();
    let quarter = Duration::from_secs(16 * 60);
    for time in [SystemTime::now() - quarter, SystemTime::now() + quarter] {
        let response = server.request("GET", "k").at(time).send();
        assert_eq!(response.outcome(), (403, "RequestTimeTooSkewed"));
    }
    let response = server.request("GET", "k").at(SystemTime::now() - quarter / 2).send();
    assert_eq!(response.outcome(), (404, "NoSuchKey"));
}

#[test]
fn a_body_that_is_not_the_signed_one_replaces_nothing() {
    let server = Server::start();
    let etag = server.put("k", "good").etag();
    let other = "0".repeat(64);
    let response = server.request("PUT", "k").body("evil").payload(&other).send();
    assert_eq!(response.outcome(), (400, "XAmzContentSHA256Mismatch"));
    let kept = server.get("k");
    assert_eq!((kept.text(), kept.etag()), ("good", etag));
}

#[test]
fn a_refusal_is_heard_however_large_the_body() {
    let server = Server::start();
    let put = |key| server.request("PUT", key).body(vec![0; 16 << 20]);
    assert_eq!(put("k").user("root", "guess").send().outcome().0, 403);
    assert_eq!(put("k").user("guest", "word").send().outcome().0, 403);
    assert_eq!(put("k").path("/no-such/k").send().outcome().0, 404);
}

#[test]
fn an_unsigned_payload_is_accepted() {
    let server = Server::start();
    let put = server.request("PUT", "k").body("x").payload("UNSIGNED-PAYLOAD");
    assert_eq!(put.send().status, 200);
    assert_eq!(server.get("k").text(), "x");
}

#[test]
fn a_policy_limits_reads_writes_and_listings() {
    let server = Server::start();
    for key in ["pub/a", "own/a", "both/a", "else/a"] {
        server.put(key, "x");
    }
    let status = |method: &str, key: &str, query: &str| {
        let request = server.request(method, key).query(query).body("");
        request.user("guest", "word").send().status
    };
    for (key, read, write) in [
        ("pub/a", 200, 403),
        ("own/a", 403, 200),
        ("both/a", 200, 200),
        ("else/a", 403, 403),
        ("pub/missing", 404, 403),
    ] {
        assert_eq!(status("GET", key, ""), read, "GET {key}");
        assert_eq!(status("HEAD", key, ""), read, "HEAD {key}");
        assert_eq!(status("PUT", key, ""), write, "PUT {key}");
    }
    assert_eq!(status("DELETE", "pub/a", ""), 403);
    assert_eq!(status("DELETE", "own/a", ""), 204);
    assert_eq!(status("GET", "", "list-type=2&prefix=pub%2F"), 200);
    assert_eq!(status("HEAD", "", ""), 200);
    let blind = |method: &str, key: &str, query: &str| {
        server.request(method, key).query(query).body("").user("blind", "word").send().status
    };
    assert_eq!(blind("GET", "pub/a", ""), 200);
    assert_eq!(blind("GET", "", "list-type=2&prefix=pub%2F"), 403);
    assert_eq!((blind("HEAD", "", ""), blind("GET", "", "location=")), (403, 200));
    // Who may not list does not learn what is missing.
    assert_eq!((blind("GET", "pub/missing", ""), blind("HEAD", "pub/missing", "")), (403, 403));
    // A condition on what is there takes the right to read it.
    let swap = |key: &str| {
        let put = server.request("PUT", key).header("if-match", "\"0\"").body("y");
        put.user("guest", "word").send().outcome().0
    };
    server.put("own/a", "x");
    assert_eq!((swap("own/a"), swap("both/a")), (403, 412));

    // No way around it: through the source of a copy, or out of one's own folder.
    let copy = server.request("PUT", "own/b").user("guest", "word");
    let copy = copy.header("x-amz-copy-source", &format!("/{BUCKET}/else/a")).send();
    assert_eq!(copy.outcome(), (403, "AccessDenied"));
    let climb = server.request("PUT", "own/../else/a").user("guest", "word").body("y").send();
    assert_eq!(climb.outcome(), (400, "InvalidArgument"));
    assert_eq!(server.get("else/a").text(), "x");
}

// Conditional writes

#[test]
fn if_none_match_star_creates_once() {
    let server = Server::start();
    let create = |body| server.request("PUT", "k").header("if-none-match", "*").body(body).send();
    assert_eq!(create("first").status, 200);
    assert_eq!(create("second").outcome(), (412, "PreconditionFailed"));
    assert_eq!(server.get("k").text(), "first");
    server.delete("k");
    assert_eq!(create("third").status, 200);
}

#[test]
fn if_match_replaces_only_the_version_it_names() {
    let server = Server::start();
    let swap = |etag: &str, body| server.request("PUT", "k").header("if-match", etag).body(body).send();
    assert_eq!(swap("\"0\"", "x").outcome(), (412, "PreconditionFailed"));
    let first = server.put("k", "1").etag();
    let second = swap(&first, "2");
    assert_eq!(second.status, 200);
    assert_eq!(swap(&first, "3").outcome(), (412, "PreconditionFailed"));
    assert_eq!(swap(second.etag().trim_matches('"'), "4").status, 200);
    assert_eq!(server.get("k").text(), "4");
}

#[test]
fn eight_writers_lose_no_update() {
    const WRITERS: usize = 8;
    const UPDATES: usize = 50;
    let server = Server::start();
    server.put("counter", "");
    let write = |writer: usize| {
        let mut refused = 0;
        for update in 0..UPDATES {
            loop {
                let old = server.get("counter");
                let new = format!("{}{writer}.{update}\n", old.text());
                let put = server.request("PUT", "counter").header("if-match", &old.etag());
                match put.body(new).send().status {
                    200 => break,
                    412 => refused += 1,
                    status => panic!("{status}"),
                }
            }
        }
        refused
    };
    let refused: usize = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|w| scope.spawn(move || write(w))).collect();
        writers.into_iter().map(|w| w.join().unwrap()).sum()
    });
    assert!(refused > 0, "the writers never met");
    let counter = server.get("counter");
    let mut lines: Vec<_> = counter.text().lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), WRITERS * UPDATES);
}

#[test]
fn plain_writes_among_conditional_ones_keep_body_and_etag_together() {
    let server = Server::start();
    server.put("k", "0");
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let server = &server;
            scope.spawn(move || {
                for n in 0..60 {
                    let body = format!("{writer}-{n}");
                    match writer {
                        0 => drop(server.put("k", body)),
                        _ => {
                            let etag = server.get("k").etag();
                            server.request("PUT", "k").header("if-match", &etag).body(body).send();
                        }
                    }
                }
            });
        }
        for _ in 0..200 {
            let seen = server.get("k");
            // The same bytes under another name must have the same ETag.
            assert_eq!(server.put("copy", &seen.body).etag(), seen.etag());
        }
    });
}

#[test]
fn a_body_on_its_way_holds_up_nobody() {
    let server = Server::start();
    server.put("k", "old");
    let slow = server.request("PUT", "k").body(vec![b'x'; 1 << 20]).payload("UNSIGNED-PAYLOAD");
    let mut socket = slow.start().unwrap();
    socket.write_all(&vec![b'x'; 1 << 19]).unwrap();

    let begin = Instant::now();
    let old = server.get("k");
    assert_eq!(old.text(), "old");
    let swap = server.request("PUT", "k").header("if-match", &old.etag()).body("new").send();
    assert_eq!(swap.status, 200);
    assert_eq!(server.get("k").text(), "new");
    assert!(begin.elapsed() < Duration::from_secs(5));

    socket.write_all(&vec![b'x'; 1 << 19]).unwrap();
    assert_eq!(receive(socket).unwrap().status, 200);
    assert_eq!(server.get("k").body.len(), 1 << 20);
}

#[test]
fn an_upload_cut_off_leaves_the_old_object() {
    let server = Server::start();
    server.put("k", "old");
    let cut = server.request("PUT", "k").body(vec![0; 1 << 20]).payload("UNSIGNED-PAYLOAD");
    let mut socket = cut.start().unwrap();
    socket.write_all(&[0; 1 << 16]).unwrap();
    drop(socket);
    assert_eq!(server.get("k").text(), "old");
    let wait = Instant::now();
    let staging = server.dir.join("root/.staging");
    while std::fs::read_dir(&staging).unwrap().next().is_some() {
        assert!(wait.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(server.get("k").text(), "old");
}

#[test]
fn large_uploads_run_side_by_side() {
    let server = Server::start();
    std::thread::scope(|scope| {
        for n in 0_u8..6 {
            let server = &server;
            scope.spawn(move || {
                let key = format!("nar/{n}.nar.zst");
                assert_eq!(server.put(&key, vec![n; 8 << 20]).status, 200);
                assert_eq!(server.get(&key).body, vec![n; 8 << 20]);
            });
        }
    });
}

// Reading

#[test]
fn etags_change_with_the_content_alone_and_outlive_a_restart() {
    let server = Server::start();
    let one = server.put("k", "1").etag();
    assert_eq!(server.get("k").etag(), one);
    assert_eq!(server.head("k").etag(), one);
    let two = server.put("k", "2").etag();
    assert_ne!(one, two);
    assert_eq!(server.put("k", "1").etag(), one);
    let server = server.restart();
    assert_eq!((server.get("k").text(), server.get("k").etag()), ("1", one));
}

#[test]
fn an_unchanged_object_is_not_sent_again() {
    let server = Server::start();
    let etag = server.put("k", "text").etag();
    for method in ["GET", "HEAD"] {
        let ask = |header, value: &str| server.request(method, "k").header(header, value).send();
        for value in [etag.as_str(), &format!("W/{etag}"), "*"] {
            let same = ask("if-none-match", value);
            assert_eq!((same.status, same.etag(), same.body.len()), (304, etag.clone(), 0));
        }
        assert_eq!(ask("if-none-match", "\"other\"").status, 200);
        assert_eq!(ask("if-match", &etag).status, 200);
        assert_eq!(ask("if-match", "\"other\"").status, 412);
    }
    let new = server.put("k", "changed");
    assert_ne!(new.etag(), etag);
    let again = server.request("GET", "k").header("if-none-match", &etag).send();
    assert_eq!((again.status, again.text()), (200, "changed"));
}

#[test]
fn ranges_are_served_and_impossible_ones_refused() {
    let server = Server::start();
    server.put("k", "0123456789");
    let ask = |range: &str| server.request("GET", "k").header("range", range).send();
    for (range, text, content_range) in [
        ("bytes=2-4", "234", "bytes 2-4/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-3", "789", "bytes 7-9/10"),
        ("bytes=8-99", "89", "bytes 8-9/10"),
        ("bytes=-99", "0123456789", "bytes 0-9/10"),
    ] {
        let part = ask(range);
        assert_eq!((part.status, part.text()), (206, text), "{range}");
        assert_eq!(part.headers["content-range"], content_range);
    }
    assert_eq!(ask("bytes=10-").outcome(), (416, "InvalidRange"));
    server.put("k", "");
    assert_eq!(ask("bytes=0-").outcome(), (416, "InvalidRange"));
    assert_eq!(ask("bytes=-5").outcome(), (416, "InvalidRange"));
}

#[test]
fn what_is_missing_is_named() {
    let server = Server::start();
    server.put("folder/k", "x");
    for key in ["missing", "folder", "folder/k/below"] {
        assert_eq!(server.get(key).outcome(), (404, "NoSuchKey"), "{key}");
        assert_eq!(server.head(key).status, 404, "{key}");
        assert_eq!(server.delete(key).status, 204, "{key}");
    }
    for (method, path) in
        [("GET", "/no-such/k"), ("PUT", "/no-such/k"), ("DELETE", "/no-such/k"), ("GET", "/no-such/")]
    {
        let response = server.request(method, "").path(path).send();
        assert_eq!(response.outcome(), (404, "NoSuchBucket"), "{method} {path}");
    }
    for path in ["/no-such/k", "/no-such/"] {
        assert_eq!(server.request("HEAD", "").path(path).send().status, 404);
    }
    assert_eq!(server.request("HEAD", "").send().status, 200);
}

#[test]
fn listings_come_in_pages() {
    let server = Server::start();
    let expected: Vec<_> = (0..25).map(|n| format!("manifests/{n:02}&.json")).collect();
    for key in &expected {
        server.put(&key.replace('&', "%26"), key);
    }
    server.put("other", "x");
    let (mut keys, mut pages, mut token) = (Vec::new(), 0, String::new());
    loop {
        // The names of a signed query are in order, so the token comes first.
        let query = format!("{token}list-type=2&max-keys=10&prefix=manifests%2F");
        let page = server.request("GET", "").query(&query).send();
        assert_eq!(page.status, 200);
        let text = page.text();
        keys.extend(elements(text, "Key").map(|key| key.replace("&amp;", "&")));
        pages += 1;
        let next = elements(text, "NextContinuationToken").next();
        assert_eq!(elements(text, "IsTruncated").next(), Some(if next.is_some() { "true" } else { "false" }));
        let Some(next) = next else { break };
        let next = next.replace("&amp;", "%26").replace('/', "%2F");
        token = format!("continuation-token={next}&");
    }
    assert_eq!((keys, pages), (expected, 3));
}

#[test]
fn a_listing_groups_by_delimiter_and_gives_etags() {
    let server = Server::start();
    let etag = server.put("top", "x").etag();
    server.put("a/1", "x");
    server.put("a/2", "x");
    let list = server.request("GET", "").query("delimiter=%2F&list-type=2").send();
    assert_eq!(elements(list.text(), "Key").collect::<Vec<_>>(), ["top"]);
    assert_eq!(elements(list.text(), "Prefix").collect::<Vec<_>>(), ["a/"]);
    let listed = elements(list.text(), "ETag").next().unwrap();
    assert_eq!(listed.replace("&quot;", "\""), etag);
}

#[test]
fn no_more_than_a_thousand_keys_are_listed_at_once() {
    let server = Server::start();
    let folder = server.dir.join("root").join(BUCKET).join("many");
    std::fs::create_dir(&folder).unwrap();
    for n in 0..1001 {
        std::fs::write(folder.join(format!("{n:04}")), "").unwrap();
    }
    let list = server.list("&max-keys=5000");
    assert_eq!(elements(list.text(), "Key").count(), 1000);
    assert_eq!(elements(list.text(), "IsTruncated").next(), Some("true"));
}

#[test]
fn a_copy_has_the_content_and_the_etag_of_its_source() {
    let server = Server::start();
    let etag = server.put("manifest.json", "one").etag();
    let copy = server.request("PUT", "manifests/1.json");
    let copy = copy.header("x-amz-copy-source", &format!("/{BUCKET}/manifest.json")).send();
    assert_eq!(copy.status, 200);
    server.put("manifest.json", "two");
    let archived = server.get("manifests/1.json");
    assert_eq!((archived.text(), archived.etag()), ("one", etag));
}

// The log and the faults

#[test]
fn every_request_leaves_a_line_in_the_log() {
    let server = Server::start();
    server.put("k", "x");
    server.get("missing");
    server.list("");
    server.request("GET", "k").anonymous().send();
    let line = |method, key, status| format!("{method} /{BUCKET}/{key} {status}");
    let expected =
        [line("PUT", "k", 200), line("GET", "missing", 404), line("GET", "", 200), line("GET", "k", 403)];
    assert_eq!(server.log(), expected);
}

#[test]
fn a_failure_befalls_so_many_requests_of_its_scope() {
    let server = Server::start();
    server.put("a/k", "x");
    server.put("b/k", "x");
    let json = r#"{"fail": {"status": 503, "code": "SlowDown", "count": 2, "methods": ["GET"], "key_prefix": "a/"}}"#;
    for _ in 0..2 {
        server.control(json);
        assert_eq!(server.get("b/k").status, 200);
        assert_eq!(server.put("a/k", "x").status, 200);
        assert_eq!(server.get("a/k").outcome(), (503, "SlowDown"));
        assert_eq!(server.get("a/k").outcome(), (503, "SlowDown"));
        assert_eq!(server.get("a/k").status, 200);
    }
    server.control(r#"{"fail": {"status": 500, "code": "InternalError", "count": null}}"#);
    for _ in 0..5 {
        let refused = server.put("a/k", vec![0; 1 << 20]);
        assert_eq!(refused.outcome(), (500, "InternalError"));
    }
    std::fs::remove_file(server.dir.join("control.json")).unwrap();
    assert_eq!(server.get("a/k").text(), "x");
}

#[test]
fn a_failure_may_come_later() {
    let server = Server::start();
    server.control(r#"{"fail": {"status": 403, "code": "AccessDenied", "skip": 2, "methods": ["PUT"]}}"#);
    let statuses = [1, 2, 3, 4].map(|n| server.put("k", n.to_string()).status);
    assert_eq!(statuses, [200, 200, 403, 403]);
}

#[test]
fn a_store_may_ignore_conditions() {
    let server = Server::start();
    server.control(r#"{"ignore_conditions": true}"#);
    for (name, value) in [("if-none-match", "*"), ("if-none-match", "*"), ("if-match", "\"0\"")] {
        assert_eq!(server.request("PUT", "k").header(name, value).body(name).send().status, 200);
    }
    assert_eq!(server.get("k").text(), "if-match");
}

#[test]
fn a_condition_may_never_hold() {
    let server = Server::start();
    server.control(r#"{"always_412": true}"#);
    let etag = server.put("k", "plain writes work").etag();
    for (key, name, value) in [("k", "if-match", etag.as_str()), ("new", "if-none-match", "*")] {
        let put = server.request("PUT", key).header(name, value).body("x").send();
        assert_eq!(put.outcome(), (412, "PreconditionFailed"));
    }
    assert_eq!(server.get("k").text(), "plain writes work");
    assert_eq!(server.get("new").status, 404);
}

#[test]
fn an_answer_may_be_late_or_garbage() {
    let server = Server::start();
    server.put("k", "x");
    server.control(r#"{"delay_ms": 300}"#);
    let begin = Instant::now();
    assert_eq!(server.get("k").text(), "x");
    assert!(begin.elapsed() >= Duration::from_millis(300));

    server.control(r#"{"garbage": true}"#);
    let page = server.list("");
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, "text/html"));
    assert!(page.text().contains("<html>"));

    server.control(r#"{"garbage": {"methods": ["GET"], "key_prefix": "k", "count": 1}}"#);
    assert_eq!(server.put("k", "y").status, 200);
    assert!(server.get("k").text().contains("<html>"));
    assert_eq!(server.get("k").text(), "y");
}

#[test]
fn an_answer_may_break_off() {
    let server = Server::start();
    server.put("k", vec![b'x'; 1 << 20]);
    server.control(r#"{"cut": {"bytes": 1000, "count": 1, "methods": ["GET"]}}"#);
    let cut = server.request("GET", "k").try_send().unwrap();
    assert!(!cut.is_complete());
    assert_eq!(cut.status, 200);
    assert_eq!(cut.headers["content-length"], (1 << 20).to_string());
    assert_eq!(cut.body.len(), 1000);
    assert_eq!(server.get("k").body.len(), 1 << 20);
}

#[test]
fn the_connection_may_be_closed_before_or_after_the_work() {
    let server = Server::start();
    server.put("k", "old");
    server.control(r#"{"reset": {"count": 1}}"#);
    assert!(server.request("PUT", "k").body("lost").try_send().is_err());
    assert_eq!(server.get("k").text(), "old");

    server.control(r#"{"reset": {"count": 1, "after": true}}"#);
    assert!(server.request("PUT", "k").body("done").try_send().is_err());
    assert_eq!(server.get("k").text(), "done");

    let put = format!("PUT /{BUCKET}/k 000");
    assert_eq!(server.log().iter().filter(|line| **line == put).count(), 2);
}

#[test]
fn a_control_file_that_makes_no_sense_is_no_silence() {
    let server = Server::start();
    server.control(r#"{"fial": {}}"#);
    let response = server.get("k");
    assert_eq!(response.outcome(), (500, "InternalError"));
    assert!(response.text().contains("fial"));
}

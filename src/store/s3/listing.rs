//! Listings of a bucket, a page at a time.

use super::answer::{AttemptError, S3Response};
use super::errors::Verb;
use super::{S3Store, within};
use crate::store::{StoreError, xml};

const PAGE_LIMIT: u64 = 16 << 20;

/// A page of a listing.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Page {
    pub(super) keys: Vec<String>,
    /// One for each key, or none where the store does not say.
    pub(super) sizes: Vec<u64>,
    pub(super) next: Option<String>,
}

/// Reads `ListBucketResult` (Amazon S3 API reference, ListObjectsV2). The error says what is wrong with it.
fn page(text: &str) -> Result<Page, String> {
    let mut page = Page::default();
    let (mut truncated, mut root) = (false, false);
    xml::leaves(text, |path, text| {
        root |= path[0] == "ListBucketResult";
        match path {
            ["ListBucketResult", "Contents", "Key"] => page.keys.push(text),
            ["ListBucketResult", "Contents", "Size"] => page.sizes.extend(text.trim().parse::<u64>()),
            ["ListBucketResult", "IsTruncated"] => truncated = text.trim() == "true",
            ["ListBucketResult", "NextContinuationToken"] => page.next = Some(text),
            _ => {}
        }
    })?;
    if !root {
        return Err("a document that is not a listing".into());
    }
    if page.sizes.len() != page.keys.len() {
        page.sizes.clear();
    }
    match (truncated, &page.next) {
        (true, None) => Err("a part of a listing without a continuation token".into()),
        (false, _) => Ok(Page { next: None, ..page }),
        (true, Some(_)) => Ok(page),
    }
}

impl S3Store {
    /// One answer to a listing, from `token` on or else behind `after`; its keys without the prefix of the store.
    pub(super) fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        token: Option<&str>,
    ) -> Result<Page, StoreError> {
        let full = self.full_key(prefix);
        let after = after.map(|after| self.full_key(after));
        let request = || {
            let query = [
                ("list-type", Some("2")),
                ("prefix", Some(full.as_str()).filter(|p| !p.is_empty())),
                ("start-after", after.as_deref()),
                ("continuation-token", token),
            ];
            let given = query.into_iter().filter_map(|(name, value)| Some((name, value?)));
            self.request("GET", None).query(given)
        };
        let read = |answer: S3Response| {
            let (bytes, whole) = answer.read(PAGE_LIMIT)?;
            if !whole {
                return Err(AttemptError::TooLarge(PAGE_LIMIT));
            }
            let text = String::from_utf8(bytes)
                .map_err(|_| AttemptError::Garbage("bytes that are not text".into()))?;
            let page = page(&text).map_err(AttemptError::Garbage)?;
            if page.next.is_some() && page.next.as_deref() == token {
                return Err(AttemptError::Garbage("the same part of a listing again and again".into()));
            }
            Ok(page)
        };
        let page =
            self.exchange(within, request, read).map_err(|gave_up| self.told(Verb::List, prefix, gave_up))?;
        let own = |key: &String| Some(key.strip_prefix(&self.location.prefix)?.to_string());
        let keys: Vec<String> = page.keys.iter().filter_map(own).collect();
        let sizes = if keys.len() == page.keys.len() { page.sizes } else { Vec::new() };
        Ok(Page { keys, sizes, next: page.next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_whole_or_not_at_all() {
        let text = |truncated: &str, token: &str| {
            format!(
                "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"x\"><Name>b</Name><Prefix>k</Prefix>\
                 <IsTruncated>{truncated}</IsTruncated>{token}<Contents><Key>k/a&amp;b</Key><Size>1</Size>\
                 <Owner><ID>Key</ID></Owner></Contents></ListBucketResult>"
            )
        };
        let token = "<NextContinuationToken>t==</NextContinuationToken>";
        let keys = vec!["k/a&b".to_string()];
        let whole = Page { keys: keys.clone(), sizes: vec![1], next: None };
        assert_eq!(page(&text("false", "")), Ok(whole));
        let part = Page { keys: keys.clone(), sizes: vec![1], next: Some("t==".into()) };
        assert_eq!(page(&text("true", token)), Ok(part));
        // Whose size is missing cannot be told.
        let end = "</ListBucketResult>";
        let without = text("false", "").replace(end, &format!("<Contents><Key>k/c</Key></Contents>{end}"));
        assert_eq!(page(&without).map(|p| (p.keys.len(), p.sizes.len())), Ok((2, 0)));
        assert!(page(&text("true", "")).is_err());
        assert!(page("<html><body>Hello</body></html>").is_err());
        assert!(page("").is_err());
    }
}

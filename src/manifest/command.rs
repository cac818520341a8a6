//! stub
use super::model::Service;
use crate::names::StorePath;
/// stub
pub fn program(_service: &Service, _path: &StorePath) -> (String, Vec<String>) {
    todo!()
}

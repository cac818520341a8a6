//! stub
use super::model::Service;
use crate::names::StorePath;
/// stub
pub fn program(service: &Service, path: &StorePath) -> (String, Vec<String>) {
    (format!("{path}/bin/{}", service.name), vec![])
}

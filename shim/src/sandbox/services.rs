//! The variables in which Kubernetes tells a container of its namespace's services. They are the cluster's of the day, and no
//! part of what an image's process is; a variable of the application's that is called like one of them is.

use std::collections::BTreeMap;

const HOST: &str = "_SERVICE_HOST";

/// Services, each with the address that all of its variables name.
pub(super) struct Services<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Services<'a> {
    /// Those of which `all`, a container's whole environment, tells in the kubelet's manner: the same address twice, and a port.
    pub(super) fn of(all: &'a [String]) -> Self {
        let variables: BTreeMap<&str, &str> = all.iter().filter_map(|variable| variable.split_once('=')).collect();
        let services = variables.iter().filter_map(|(name, address)| {
            let service = name.strip_suffix(HOST).filter(|service| !service.is_empty())?;
            let link = format!("{service}_PORT_");
            let named = variables.iter().any(|(name, value)| {
                name.strip_prefix(&link).is_some_and(|rest| rest.ends_with("_ADDR")) && value == address
            });
            let port = variables.get(format!("{service}_SERVICE_PORT").as_str()).copied();
            (named && is_address(address) && port.is_some_and(is_port)).then_some((service, *address))
        });
        Self(services.collect())
    }

    /// Whether it is one of theirs: `<SERVICE>_SERVICE_HOST`, `_SERVICE_PORT`, `_SERVICE_PORT_<NAME>`, and Docker's `_PORT` and
    /// `_PORT_<NUMBER>_<PROTOCOL>`, that with `_PROTO`, `_PORT` and `_ADDR`, too. With a value of another form it was set by
    /// somebody else.
    pub(super) fn tell(&self, variable: &str) -> bool {
        let Some((name, value)) = variable.split_once('=') else { return false };
        self.0.iter().any(|(service, address)| match name.strip_prefix(service) {
            Some(HOST) => value == *address,
            Some("_PORT") => is_link(value, address),
            Some(rest) if rest == "_SERVICE_PORT" || rest.starts_with("_SERVICE_PORT_") => is_port(value),
            Some(rest) if rest.starts_with("_PORT_") => match rest.rsplit_once('_') {
                Some((_, "ADDR")) => value == *address,
                Some((_, "PORT")) => is_port(value),
                Some((_, "PROTO")) => ["tcp", "udp", "sctp"].contains(&value),
                _ => is_link(value, address),
            },
            _ => false,
        })
    }
}

fn is_address(value: &str) -> bool {
    value.parse::<std::net::IpAddr>().is_ok()
}

fn is_port(value: &str) -> bool {
    value.parse::<u16>().is_ok()
}

/// `tcp://10.0.0.1:80`, `udp://[fd00::1]:53`.
fn is_link(value: &str, address: &str) -> bool {
    let Some((_, place)) = value.split_once("://") else { return false };
    let Some((host, port)) = place.rsplit_once(':') else { return false };
    host.trim_start_matches('[').trim_end_matches(']') == address && is_port(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kubelet writes them for one with a named port, and one whose address is of version 6.
    const KUBELETS: [&str; 14] = [
        "WEB_SERVICE_HOST=10.0.0.1",
        "WEB_SERVICE_PORT=80",
        "WEB_SERVICE_PORT_HTTP=80",
        "WEB_PORT=tcp://10.0.0.1:80",
        "WEB_PORT_80_TCP=tcp://10.0.0.1:80",
        "WEB_PORT_80_TCP_PROTO=tcp",
        "WEB_PORT_80_TCP_PORT=80",
        "WEB_PORT_80_TCP_ADDR=10.0.0.1",
        "DNS_SERVICE_HOST=fd00::a",
        "DNS_SERVICE_PORT=53",
        "DNS_PORT=udp://[fd00::a]:53",
        "DNS_PORT_53_UDP=udp://[fd00::a]:53",
        "DNS_PORT_53_UDP_PORT=53",
        "DNS_PORT_53_UDP_ADDR=fd00::a",
    ];

    fn told(variables: &[&str]) -> Vec<String> {
        let all: Vec<String> = variables.iter().map(|variable| (*variable).to_owned()).collect();
        let services = Services::of(&all);
        all.iter().filter(|variable| services.tell(variable)).cloned().collect()
    }

    #[test]
    fn what_the_kubelet_writes_is_told_from_what_is_called_like_it() {
        assert_eq!(told(&KUBELETS), KUBELETS);
        // An application's, beside a service of its name: the last one of a name counts.
        let mut with_port = KUBELETS.to_vec();
        with_port[3] = "WEB_PORT=8080";
        assert_eq!(told(&with_port).len(), KUBELETS.len() - 1);
        let mut elsewhere = KUBELETS.to_vec();
        elsewhere[0] = "WEB_SERVICE_HOST=10.9.9.9";
        assert_eq!(told(&elsewhere), KUBELETS[8..]);
        // Without a service.
        for own in [
            &["PAYMENT_SERVICE_HOST=prod.example", "PAYMENT_SERVICE_PORT=80"][..],
            &["PAYMENT_SERVICE_HOST=10.0.0.7", "PAYMENT_SERVICE_PORT=80", "PAYMENT_PORT=80"],
            &["APP_PORT=80", "_SERVICE_HOST=10.0.0.1", "_SERVICE_PORT=1", "_PORT_1_TCP_ADDR=10.0.0.1"],
        ] {
            assert!(told(own).is_empty(), "{own:?}");
        }
    }
}

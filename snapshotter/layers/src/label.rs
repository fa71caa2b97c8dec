//! The SELinux label of mounted layers.
//!
//! Layers carry no labels of their own, so that SELinux gives their files that of the file system's type. A mount's
//! `context=` (mount(8)) puts one label on all of them.

use std::path::Path;

/// There as long as SELinux is on.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// What mounts are labelled with, if anything.
#[derive(Clone, Debug, Default)]
pub struct Label(Option<String>);

impl Label {
    /// `context` is `user:role:type:level`. Without one there is no label, and none where SELinux is off: such a kernel
    /// refuses the option.
    pub fn new(context: Option<&str>) -> Self {
        let label = Self::where_selinux(Path::new(SELINUX).exists(), context);
        if let (Some(context), None) = (context, &label.0) {
            tracing::info!(context, "SELinux is off: layers are mounted without their label");
        }
        label
    }

    fn where_selinux(is_on: bool, context: Option<&str>) -> Self {
        Self(context.filter(|_| is_on).map(str::to_owned))
    }

    /// A file system's own options, and the label's. Levels may hold commas, so that it is quoted.
    pub fn with(&self, options: String) -> String {
        match &self.0 {
            Some(context) => format!("{options},context=\"{context}\""),
            None => options,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Label;

    #[test]
    fn mounts_are_labelled_where_selinux_is_on() {
        let context = Some("system_u:object_r:container_file_t:s0:c1,c2");
        let with = |is_on, context| Label::where_selinux(is_on, context).with("a=1".to_owned());
        let labelled = "a=1,context=\"system_u:object_r:container_file_t:s0:c1,c2\"";
        assert_eq!(with(true, context), labelled);
        assert_eq!(with(false, context), "a=1");
        assert_eq!(with(true, None), "a=1");
    }
}

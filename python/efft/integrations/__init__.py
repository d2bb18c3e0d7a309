"""EFFT as a part of other libraries; each module needs the library it is named after."""

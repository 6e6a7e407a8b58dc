//! The machine-readable AI label: one XMP packet with IPTC's digital source type.
//!
//! Films always carry it; pictures carry it when they are written with [`super::still::generated_png`] or
//! [`super::still::generated_jpeg`], since a picture that a user handed in is not ours to label.

/// Keyword of the PNG text chunk that holds XMP.
pub const PNG_KEY: &str = "XML:com.adobe.xmp";

/// Key of the container metadata that holds XMP in an mp4.
pub const VIDEO_KEY: &str = "xmp";

/// IPTC's word for "made by a trained model".
pub const SOURCE_TYPE: &str =
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

/// The packet.
pub const XMP: &str = concat!(
    r#"<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>"#,
    r#"<x:xmpmeta xmlns:x="adobe:ns:meta/">"#,
    r#"<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">"#,
    r#"<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" "#,
    r#"Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>"#,
    r#"</rdf:RDF></x:xmpmeta><?xpacket end="r"?>"#
);

/// The type of the `uuid` box that XMP uses in ISO media files (XMP specification, part 3).
pub(super) const XMP_BOX: [u8; 16] = [
    0xBE, 0x7A, 0xCF, 0xCB, 0x97, 0xA9, 0x42, 0xE8, 0x9C, 0x71, 0x99, 0x94, 0x91, 0xE3, 0xAF, 0xAC,
];

/// One ISO media `uuid` box with `xmp` inside.
pub(super) fn xmp_box(xmp: &str) -> Option<Vec<u8>> {
    let length = u32::try_from(8 + XMP_BOX.len() + xmp.len()).ok()?;
    Some([&length.to_be_bytes(), b"uuid".as_slice(), &XMP_BOX, xmp.as_bytes()].concat())
}

/// One JPEG APP1 segment with `xmp` inside; `None` when it does not fit.
pub(super) fn jpeg_segment(xmp: &str) -> Option<Vec<u8>> {
    let name = b"http://ns.adobe.com/xap/1.0/\0";
    let length = u16::try_from(2 + name.len() + xmp.len()).ok()?;
    Some([&[0xFF, 0xE1], length.to_be_bytes().as_slice(), name, xmp.as_bytes()].concat())
}

import re

from PIL import Image

from nextblock.evaluation.result_page import write_result_page


def test_the_page_shows_figures_reasons_settings_and_pictures(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "samples.png")
    result = {"fid": 12.3456, "inception_score": None, "inception_score_reason": "no <scores>", "num_images": 50}
    result |= {"seed": 7, "psnr": "inf", "crop": None}
    figures = {"fid": "Fréchet distance", "inception_score": "inception score", "psnr": "PSNR", "recall": "recall"}
    pictures = {"samples.png": "first samples", "neighbours.png": "nearest images"}
    write_result_page(tmp_path, result, figures, pictures)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert "<td>fid</td><td>Fréchet distance</td><td>12.35</td>" in rows
    assert "<td>inception_score</td><td>inception score</td><td>none: no &lt;scores&gt;</td>" in rows
    assert "<td>psnr</td><td>PSNR</td><td>inf</td>" in rows
    assert "<td>recall</td><td>recall</td><td>none: not measured</td>" in rows
    assert rows[4:] == ["<td>num_images</td><td>50</td>", "<td>seed</td><td>7</td>", "<td>crop</td><td>–</td>"]
    assert page.count("data:image/png;base64,") == 1 and "first samples" in page and "nearest images" not in page

// Light or dark as the reader's system, until the button says otherwise.
function theme(name) {
  root.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
}
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
byId("theme").addEventListener("click", () => {
  theme(root.dataset.theme === "dark" ? "light" : "dark");
  choose({ theme: root.dataset.theme });
});

byId("subtitle").textContent = D.subtitle;
byId("footer").textContent = D.footer;
byId("observations").textContent = D.observations;
byId("findings").append(...D.findings.map((sentence) => make("li", { textContent: sentence })));
drawLoads();
drawControls();
drawTokens();
drawCompare();
drawGroups();
drawTogether();
drawWords();
for (const section of document.querySelectorAll("main > section:not([hidden])"))
  document.querySelector("nav").append(make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }));
